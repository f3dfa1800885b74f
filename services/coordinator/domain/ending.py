"""What follows a finished round: the next one, an early stop, a pause or the end; and which versions stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cortex_common.job.spec import CheckpointSpec, EarlyStoppingSpec
from cortex_common.job.status import RoundReport
from services.coordinator.domain.job import Job, Note, Stage


def finish_round(job: Job, report: RoundReport, wall_s: float) -> tuple[Job, tuple[Note, ...]]:
    """Put the round into the history and go on."""
    done = replace(job, history=(*job.history, report), pending=None, cohort=(), sealed=(), dropped=())
    shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(report.metrics.items()))
    note = Note(
        "round_closed",
        job.round,
        f"{report.accepted} of {report.participants} updates in {report.seconds:.2f} s; {shown}",
    )
    stop = stopping_reason(done.history, job.spec.training.early_stopping)
    if stop is not None:
        return _completed(done, stop, wall_s, note)
    if job.round >= job.spec.training.rounds:
        return _completed(done, f"all {job.round} rounds done", wall_s, note)
    following = replace(done, round=job.round + 1, attempt=1, moves=0, stage=Stage.GATHERING)
    if job.pausing:
        rested = replace(following, stage=Stage.PAUSED, pausing=False, seats=())
        return rested, (note, Note("job_paused", job.round, "paused as asked"))
    return following, (note,)


def _completed(job: Job, reason: str, wall_s: float, note: Note) -> tuple[Job, tuple[Note, ...]]:
    return complete(job, wall_s), (note, Note("job_completed", job.round, reason))


def complete(job: Job, wall_s: float) -> Job:
    """The job at its good end."""
    return replace(job, stage=Stage.COMPLETED, finished_s=wall_s)


def stopping_reason(history: Sequence[RoundReport], rule: EarlyStoppingSpec | None) -> str | None:
    """Why training should stop after the last round of the history; None to go on."""
    if rule is None:
        return None
    higher_is_better = rule.metric.endswith("accuracy")
    best: float | None = None
    stale = 0
    for report in history:
        value = report.metrics.get(rule.metric)
        if value is None:
            continue
        if rule.target is not None and (value >= rule.target if higher_is_better else value <= rule.target):
            return f"{rule.metric} {value:.4f} has reached the target {rule.target}"
        gain = 0.0 if best is None else (value - best if higher_is_better else best - value)
        if best is None or gain > rule.min_delta:
            best, stale = value, 0
        else:
            stale += 1
    if stale >= rule.patience:
        return f"{rule.metric} has not improved by more than {rule.min_delta} for {stale} rounds (best {best:.4f})"
    return None


def best_round(history: Sequence[RoundReport], rule: EarlyStoppingSpec | None) -> int | None:
    """The round with the best value of the metric that matters to the job; None when nothing was measured."""
    metric = rule.metric if rule else "test_accuracy"
    measured = [(report.metrics[metric], report.round) for report in history if metric in report.metrics]
    if not measured:
        return None
    if metric.endswith("accuracy"):
        return max(measured, key=lambda pair: (pair[0], pair[1]))[1]
    return min(measured, key=lambda pair: (pair[0], -pair[1]))[1]


def kept_rounds(history: Sequence[RoundReport], newest: int, rule: CheckpointSpec, best: int | None) -> frozenset[int]:
    """Rounds whose versions stay: the newest, then the best, then every `every`-th downwards; `keep` in all."""
    candidates = [newest]
    if best is not None:
        candidates.append(best)
    candidates += [report.round for report in reversed(history) if report.round % rule.every == 0]
    kept: list[int] = []
    for number in candidates:
        if number not in kept and len(kept) < rule.keep:
            kept.append(number)
    return frozenset(kept)
