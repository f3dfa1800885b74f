"""What a round measured, added up from what workers and aggregators reported."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cortex_common.job.status import Dropped, RoundReport
from services.coordinator.domain.job import Job, Version
from services.coordinator.domain.seen import SliceScore


def round_report(job: Job, version: Version, wall_s: float, crossing: int = 0) -> RoundReport:
    """The finished round; its times are those of the slowest contributor, `crossing` its bytes between regions."""
    counted = [entry.trained for entry in job.sealed if entry.trained is not None]
    return RoundReport(
        round=job.round,
        attempt=job.attempt,
        seconds=max(0.0, wall_s - (job.opened_s if job.opened_s is not None else wall_s)),
        train_seconds=max((worker.train_s for worker in counted), default=0.0),
        exchange_seconds=max((worker.exchange_s for worker in counted), default=0.0),
        bytes_up=sum(entry.size_bytes for entry in job.sealed),
        bytes_down=sum(worker.bytes_down for worker in counted),
        bytes_between_regions=crossing,
        participants=len(job.cohort) + len({dropout.seat for dropout in job.dropped} - set(job.cohort)),
        accepted=len(job.sealed),
        dropped=tuple(Dropped(worker=dropout.worker, reason=dropout.reason) for dropout in job.dropped),
        metrics=train_metrics(job),
        model_sha256=version.sha256,
    )


def train_metrics(job: Job) -> dict[str, float]:
    """Means over the contributors, weighted by examples, in seat order so that a rerun gives the same digits."""
    totals: dict[str, float] = {}
    weights: dict[str, int] = {}
    for entry in job.sealed:
        trained = entry.trained
        if trained is None:
            continue
        for name, value in trained.metrics.items():
            if math.isfinite(value):
                totals[name] = totals.get(name, 0.0) + value * trained.examples
                weights[name] = weights.get(name, 0) + trained.examples
    means = {name: totals[name] / weights[name] for name in totals if weights[name]}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def test_metrics(scores: Mapping[int, SliceScore]) -> dict[str, float]:
    """Loss and accuracy over the whole test set."""
    ordered = [scores[index] for index in sorted(scores)]
    examples = sum(score.examples for score in ordered)
    if not examples:
        return {}
    loss = sum(score.loss_sum for score in ordered) / examples
    accuracy = sum(score.correct for score in ordered) / examples
    return {"test_accuracy": accuracy} | ({"test_loss": loss} if math.isfinite(loss) else {})
