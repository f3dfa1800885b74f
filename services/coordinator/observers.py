"""What goes out about jobs: log lines, Prometheus metrics and TensorBoard scalars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from cortex_common.ids import JobId
from cortex_common.job.status import JobPhase
from cortex_common.logging import get_logger
from cortex_common.telemetry.metrics import counter, gauge, histogram
from cortex_common.telemetry.tensorboard import ScalarLog
from services.coordinator.curves import Curves
from services.coordinator.domain.job import Job, Note, Stage

log = get_logger(__name__)

_ENDINGS = frozenset({"job_completed", "job_failed", "job_cancelled"})
_JOBS = gauge("cortex_coordinator_jobs", "Unfinished jobs.", ["status"])
_ENDED = counter("cortex_coordinator_jobs_ended_total", "Jobs that ended.", ["status"])
_ROUNDS = counter("cortex_coordinator_rounds_total", "Rounds that ended well.")
_RETRIED = counter("cortex_coordinator_rounds_retried_total", "Attempts at a round given up.")
_SECONDS = histogram("cortex_coordinator_round_seconds", "Seconds of a round, by phase.", ["phase"])
_UPDATES = counter("cortex_coordinator_updates_total", "Updates of finished rounds.", ["result"])
_BYTES = counter("cortex_coordinator_bytes_total", "Payload of finished rounds.", ["direction"])
# A counter that is first seen at 1 has not increased: alerts need the zero.
for _stage in (Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED):
    _ENDED.labels(_stage.value)


class Observers:
    """Tells the world what happens to jobs."""

    def __init__(self, tensorboard_root: Path) -> None:
        self._root = tensorboard_root
        self._scalars: dict[JobId, ScalarLog] = {}
        self._counted: Counter[JobPhase] | None = None
        self._curves = Curves()

    def tensorboard_dir(self, job_id: JobId) -> str:
        """Where TensorBoard finds the job's scalars."""
        return str(self._root / job_id)

    def noted(self, job: Job, note: Note) -> None:
        """A line of the job's event log."""
        log.info(note.name, job_id=job.id, round=note.round, attempt=job.attempt, detail=note.message)
        if note.name == "round_retried":
            _RETRIED.inc()
        if note.name in _ENDINGS:
            _ENDED.labels(job.stage.value).inc()
            self._close(job.id)

    def round_finished(self, job: Job, wall_s: float) -> None:
        """The newest round of the history, which was finished at `wall_s`."""
        report = job.history[-1]
        self._curves.round_finished(job, wall_s)
        _ROUNDS.inc()
        _UPDATES.labels("accepted").inc(report.accepted)
        _UPDATES.labels("dropped").inc(len(report.dropped))
        _BYTES.labels("up").inc(report.bytes_up)
        _BYTES.labels("down").inc(report.bytes_down)
        phases = {"whole": report.seconds, "train": report.train_seconds, "exchange": report.exchange_seconds}
        for phase, seconds in phases.items():
            _SECONDS.labels(phase).observe(seconds)
        scalars = {**report.metrics, **{f"seconds/{phase}": seconds for phase, seconds in phases.items()}}
        scalars |= {"bytes/up": report.bytes_up, "bytes/down": report.bytes_down}
        scalars |= {"workers/accepted": report.accepted, "workers/dropped": len(report.dropped)}
        self._write(job.id, report.round, scalars)
        if job.stage.is_terminal:
            self._close(job.id)

    def jobs(self, jobs: Iterable[Job]) -> None:
        """All jobs in memory."""
        count = Counter(job.phase for job in jobs)
        if count == self._counted:
            return
        self._counted = count
        for phase in JobPhase:
            if not phase.is_terminal:
                _JOBS.labels(phase.value).set(count[phase])

    def close(self) -> None:
        """Flush everything."""
        for job_id in list(self._scalars):
            self._close(job_id)

    def _write(self, job_id: JobId, step: int, scalars: Mapping[str, float]) -> None:
        """Add to the job's curves; a disk that takes none costs those, not the coordinator."""
        try:
            if job_id not in self._scalars:
                self._scalars[job_id] = ScalarLog(self._root / job_id)
            self._scalars[job_id].write(step, scalars)
        except OSError as error:
            log.warning("scalars_not_written", job_id=job_id, round=step, reason=str(error))
            self._close(job_id)

    def _close(self, job_id: JobId) -> None:
        if scalars := self._scalars.pop(job_id, None):
            with suppress(OSError):
                scalars.close()
