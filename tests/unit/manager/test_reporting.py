"""What a program shows and writes of its training: the progress bar, TensorBoard, files of the rounds."""

from __future__ import annotations

import io
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cortex.integration.reporting import Scalars, progress_bar, write_checkpoint
from cortex.integration.settings import ManagerSettings
from cortex_common.ids import JobId
from cortex_common.job.status import JobPhase, JobStatus, RoundReport
from cortex_common.logging import configure_logging, get_logger
from cortex_common.tensors import Arena, Manifest, TensorKind

pytestmark = pytest.mark.usefixtures("logging_as_before")

MANIFEST = Manifest.of([("w", (2, 3), TensorKind.TRAINABLE)])
ERASED = "\r\x1b[2K"


class Screen(io.StringIO):
    """Where output goes: a terminal, or not."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def lines(self) -> list[str]:
        """What stays to be read: no colours, and of each line what was written after it was last erased."""
        left = [line.rpartition(ERASED)[2] for line in self.getvalue().split("\n")]
        return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in left]


def screen(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> Screen:
    """The standard error stream of a program."""
    made = Screen(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return made


def settings_with(wanted: bool | None) -> ManagerSettings:
    sections = {"network": {"node_id": "n1"}, "training": {"input_dim": 4, "output_dim": 2}}
    return ManagerSettings.model_validate(sections | {"monitoring": {"progress_bar": wanted}})


def status_after(rounds: int) -> JobStatus:
    return JobStatus(
        job_id="job-1",
        name="own",
        status=JobPhase.TRAINING,
        round=rounds,
        rounds=5,
        metrics={"train_loss": 0.25},
        history=tuple(RoundReport(round=number) for number in range(1, rounds + 1)),
        submitted_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("wanted", "is_terminal", "is_shown"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_the_bar_is_shown_where_it_is_wanted_or_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | None, is_terminal: bool, is_shown: bool
) -> None:
    stderr = screen(monkeypatch, is_terminal=is_terminal)
    with progress_bar(settings_with(wanted)) as bar:
        bar.show(status_after(2), "training")
        bar.show(status_after(3), "training")
    shown = [line for line in stderr.lines if line]
    assert bool(shown) is is_shown
    assert [("own" in line, "round 3/5" in line, "train_loss 0.25" in line) for line in shown] == [(True,) * 3] * len(
        shown
    )


def test_log_lines_keep_off_the_bars_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = screen(monkeypatch, is_terminal=True)
    configure_logging("n1", "INFO", json=False)
    with progress_bar(settings_with(None)) as bar:
        for rounds in (1, 2):
            bar.show(status_after(rounds), "training")
            get_logger("x").info("round_seen", number=rounds)
    with_event = [line for line in stderr.lines if "round_seen" in line]
    assert len(with_event) == 2
    assert not any("train_loss" in line or "━" in line for line in with_event)
    assert sum("round 2/5" in line for line in stderr.lines) == 1


def test_each_jobs_scalars_are_a_run_of_their_own(tmp_path: Path) -> None:
    for job_id, rounds in (("job-1", 3), ("job-2", 2)):
        scalars = Scalars(tmp_path)
        for number in range(1, rounds + 1):
            scalars.write(
                JobId(job_id), RoundReport(round=number, seconds=2.0, accepted=4, metrics={"train_loss": 1 / number})
            )
        scalars.close()
    for job_id, rounds in (("job-1", 3), ("job-2", 2)):
        run = EventAccumulator(str(tmp_path / job_id)).Reload()
        assert set(run.Tags()["scalars"]) == {"seconds", "train_seconds", "accepted", "train_loss"}
        told = [(event.step, event.value) for event in run.Scalars("train_loss")]
        assert told == [(number, pytest.approx(1 / number)) for number in range(1, rounds + 1)]
        assert {event.value for event in run.Scalars("accepted")} == {4.0}


def test_without_a_folder_no_scalars_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scalars = Scalars(None)
    scalars.write(JobId("job-1"), RoundReport(round=1))
    scalars.close()
    assert list(tmp_path.iterdir()) == []


def test_of_a_jobs_checkpoints_the_newest_stay_and_nobody_elses_file_goes(tmp_path: Path) -> None:
    others = [tmp_path / f"{name}.safetensors" for name in ("job-1-best", "job-10-1", "job-1-2-1", "mine")]
    for path in others:
        path.touch()
    for number in (1, 2, 9, 10, 11):
        arena = Arena.zeros(MANIFEST)
        arena.values[:] = number
        write_checkpoint(tmp_path, 3, f"job-1-{number}", MANIFEST, arena)
    left = sorted(path.name for path in tmp_path.iterdir() if path not in others)
    assert left == ["job-1-10.safetensors", "job-1-11.safetensors", "job-1-9.safetensors"]
    assert all(path.exists() for path in others)
    np.testing.assert_array_equal(load_file(tmp_path / left[0])["w"], np.full((2, 3), 10, np.float32))
