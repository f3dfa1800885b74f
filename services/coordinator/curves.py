"""Where the jobs of a coordinator stand, as gauges: for as many jobs at a time as Prometheus should keep."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress

from cortex_common.telemetry.metrics import gauge
from services.coordinator.domain.job import Job

MOST_JOBS = 64
_PARTS = ("train", "test")
_ROUND = gauge("cortex_coordinator_job_round", "Newest finished round of a job.", ["name"])
_PROGRESS = gauge("cortex_coordinator_job_progress_ratio", "Rounds done of the rounds asked for, 0 to 1.", ["name"])
_GOODPUT = gauge("cortex_coordinator_job_goodput_ratio", "Time that went into rounds that counted, 0 to 1.", ["name"])
_LOSS = gauge("cortex_coordinator_job_loss", "Loss of the newest round.", ["name", "part"])
_ACCURACY = gauge("cortex_coordinator_job_accuracy_ratio", "Accuracy of the newest round, 0 to 1.", ["name", "part"])


class Curves:
    """Progress, goodput, loss and accuracy of the jobs that finished a round last, `most` of them.

    Jobs are told apart by name, not by id: jobs of one name share their curves, the newest round is shown.
    """

    def __init__(self, most: int = MOST_JOBS) -> None:
        self._most = most
        self._names: OrderedDict[str, None] = OrderedDict()

    def round_finished(self, job: Job, wall_s: float) -> None:
        """Show the newest round of the history, which was finished at `wall_s`."""
        name, report = job.spec.name, job.history[-1]
        self._names[name] = None
        self._names.move_to_end(name)
        while len(self._names) > self._most:
            self._forget(self._names.popitem(last=False)[0])
        _ROUND.labels(name).set(report.round)
        _PROGRESS.labels(name).set(report.round / job.spec.training.rounds)
        _GOODPUT.labels(name).set(job.goodput(wall_s))
        for part in _PARTS:
            for what, metric in (("loss", _LOSS), ("accuracy", _ACCURACY)):
                if (value := report.metrics.get(f"{part}_{what}")) is not None:
                    metric.labels(name, part).set(value)

    def _forget(self, name: str) -> None:
        for metric in (_ROUND, _PROGRESS, _GOODPUT):
            metric.remove(name)
        for metric in (_LOSS, _ACCURACY):
            for part in _PARTS:
                with suppress(KeyError):
                    metric.remove(name, part)
