"""The status object out of a job and what was seen of it."""

from __future__ import annotations

from datetime import UTC, datetime

from cortex_common.job.status import JobStatus, ModelSummary, SiteRefusal, WorkerActivity
from services.coordinator.domain.advance import Now
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import Seen, World


def status_of(job: Job, seen: Seen, world: World, now: Now, reason: str | None, scalars: str | None) -> JobStatus:
    """What people are told. `reason` is what the job waits for, `scalars` where TensorBoard finds its curves."""
    version = job.version
    model = ModelSummary(round=version.round, sha256=version.sha256, parameters=version.parameters) if version else None
    return JobStatus(
        job_id=job.id,
        name=job.spec.name,
        status=job.phase,
        round=min(job.round, job.spec.training.rounds),
        rounds=job.spec.training.rounds,
        waiting_for=reason,
        metrics=job.history[-1].metrics if job.history else (version.metrics if version else {}),
        history=job.history,
        model=model,
        goodput=job.goodput(now.wall_s),
        error=job.error,
        submitted_at=datetime.fromtimestamp(job.submitted_s, UTC),
        started_at=_moment(job.started_s),
        finished_at=_moment(job.finished_s),
        owner=job.owner,
        workers=() if job.stage.is_terminal else tuple(_activities(job, seen, world, now.monotonic_s)),
        tensorboard_dir=scalars,
        refusals=tuple(
            SiteRefusal(worker=name, rule=each.rule, message=each.message)
            for name, refusals in sorted(world.refused.items())
            for each in refusals
        ),
    )


def _moment(wall_s: float | None) -> datetime | None:
    return None if wall_s is None else datetime.fromtimestamp(wall_s, UTC)


def _activities(job: Job, seen: Seen, world: World, now_s: float) -> list[WorkerActivity]:
    shown = []
    for seat, name in enumerate(job.seats):
        if name is None:
            continue
        worker = world.workers.get(name)
        words, since_s = _doing(job, seen, seat, name, worker is not None and worker.lost_since_s is None)
        region = worker.region if worker else ""
        shown.append(
            WorkerActivity(seat=seat, worker=name, region=region, activity=words, since_s=max(0.0, now_s - since_s))
        )
    return shown


def _doing(job: Job, seen: Seen, seat: int, name: str, is_attending: bool) -> tuple[str, float]:
    if not is_attending:
        return "lost", seen.since_s
    activity = next((known for index, known in seen.activities.items() if index == seat), None)
    if job.stage is Stage.COLLECTING and seat in seen.accepted:
        return "done", seen.accepted_at.get(next(k for k in seen.accepted if k == seat), seen.since_s)
    if activity is not None and activity.worker == name:
        return activity.words, activity.since_s
    return "waiting", seen.since_s
