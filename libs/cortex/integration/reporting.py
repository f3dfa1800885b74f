"""What a person sees of the training: a progress bar, TensorBoard, and files of the rounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cortex.integration.settings import ManagerSettings
from cortex.local.files import replacing
from cortex_common.ids import JobId
from cortex_common.job.status import JobStatus, RoundReport
from cortex_common.tensors import Arena, Manifest, write_safetensors

if TYPE_CHECKING:
    from cortex_common.telemetry.tensorboard import ScalarLog


class Bar:
    """A line that shows the rounds; silent unless it is wanted."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def show(self, status: JobStatus, activity: str) -> None:
        """The rounds done, and what is being done."""
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task(status.name, total=status.rounds, figures="")
        figures = "  ".join(f"{name} {value:.4g}" for name, value in sorted(status.metrics.items()))
        told = figures or status.waiting_for or activity
        self._progress.update(self._task, completed=len(status.history), total=status.rounds, figures=told)


@contextmanager
def progress_bar(settings: ManagerSettings) -> Iterator[Bar]:
    """One for as long as the block lasts, if it is wanted or somebody looks."""
    console = Console(file=sys.stderr)
    wanted = settings.monitoring.progress_bar
    if wanted is False or (wanted is None and not (console.is_terminal or console.is_jupyter)):
        yield Bar(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("round {task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[figures]}"), console=console) as progress:
        yield Bar(progress)


class Scalars:
    """TensorBoard scalars of the rounds, a run for each job; none without a folder."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._log: ScalarLog | None = None

    def write(self, job_id: JobId, report: RoundReport) -> None:
        """One round of the one job that this is asked about."""
        if self._directory is None:
            return
        if self._log is None:
            from cortex_common.telemetry.tensorboard import ScalarLog

            self._log = ScalarLog(self._directory.expanduser() / job_id)
        times = {"seconds": report.seconds, "train_seconds": report.train_seconds}
        self._log.write(report.round, {**times, "accepted": float(report.accepted), **report.metrics})

    def close(self) -> None:
        """Finish the file."""
        if self._log is not None:
            self._log.close()


def write_checkpoint(directory: Path, keep: int, name: str, manifest: Manifest, arena: Arena) -> Path:
    """Write a version as `<name>.safetensors`, whole or not at all; of its job, the newest `keep` stay."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.safetensors"
    with replacing(path) as file:
        write_safetensors(file, manifest, arena)
    job = name.rpartition("-")[0]
    rounds = {each: each.stem.rpartition("-") for each in directory.glob(f"{job}-*.safetensors")}
    own = [each for each, (of, _, number) in rounds.items() if of == job and number.isdecimal()]
    for each in sorted(own, key=lambda each: int(rounds[each][2]))[:-keep]:
        each.unlink(missing_ok=True)
    return path
