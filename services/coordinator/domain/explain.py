"""The answer to "what is it waiting for?"."""

from __future__ import annotations

from cortex_common.ids import SeatIndex
from services.coordinator.domain.advance import lacking_aggregator, quorum_of, refused_by
from services.coordinator.domain.assignments import nobody_evaluates
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.placement import fill_seats, misfit, no_evaluator
from services.coordinator.domain.seen import Rules, Seen, World


def waiting_for(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> str | None:
    """One line a person can act on; None when the job has ended."""
    if job.stage.is_terminal:
        return None
    if job.stage is Stage.PAUSED:
        return "resume: the job is paused"
    if job.aggregator in world.revoked and job.version is not None:
        return f"{lacking_aggregator(job, world)}; a new join token lets it in again"
    if seen.trouble is not None:
        return seen.trouble
    if job.aggregator and job.aggregator not in world.revoked and world.is_gone(job.aggregator):
        return f"aggregator {job.aggregator}: it is gone, and the job's versions are there"
    if job.stage is Stage.GATHERING:
        return _gathering(job, world, rules, now_s)
    if job.stage is Stage.SEALED:
        return f"aggregator {job.aggregator} (adding up {len(job.sealed)} updates)"
    if job.stage is Stage.TESTING:
        done = len(seen.scores)
        nobody = nobody_evaluates(job, seen, world, rules, now_s)
        return f"evaluation: {done} of {len(job.seats)} slices of {job.spec.data.test} done{nobody}"
    if not seen.open_seats:
        return f"aggregator {job.aggregator} (opening round {job.round})"
    return _collecting(job, seen, world, rules, now_s)


def _gathering(job: Job, world: World, rules: Rules, now_s: float) -> str:
    seats = fill_seats(job, world, rules, now_s)
    ready = [
        view
        for name in seats
        if name and (view := world.workers.get(name)) and view.is_live(now_s, rules.lease_s) and world.is_willing(name)
    ]
    filled = len(ready)
    untested = no_evaluator(ready, job.spec) if filled >= job.spec.placement.least else None
    unfit = sum(1 for worker in world.workers.values() if misfit(worker, job.spec))
    busy = len(world.taken)
    needs_another = job.aggregator is None or job.aggregator in world.revoked
    if needs_another and not any(aggregator.is_live for aggregator in world.aggregators.values()):
        return lacking_aggregator(job, world)
    details = ", ".join(text for count, text in ((busy, f"{busy} busy"), (unfit, f"{unfit} do not fit")) if count)
    least = job.spec.placement.least
    wanted = f"{len(seats)}" if least == len(seats) else f"{len(seats)} (at least {least})"
    told = "".join(f"; {text}" for text in (untested, details) if text)
    return f"workers: {filled} of {wanted} ready{told}{refused_by(world)}"


def _collecting(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> str:
    missing = [seat for seat in job.cohort if seat not in seen.accepted]
    left_s = max(0.0, job.spec.aggregation.deadline - (now_s - seen.since_s))
    quorum = f"quorum {len(seen.accepted)}/{quorum_of(job)}; deadline in {left_s:.0f} s"
    if not missing:
        return f"the last reports; {quorum}"
    shown = ", ".join(_member(job, seat, seen, world, now_s) for seat in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{'worker' if len(missing) == 1 else 'workers'} {shown}{more}; {quorum}"


def _member(job: Job, seat: SeatIndex, seen: Seen, world: World, now_s: float) -> str:
    name = job.members.get(seat)
    worker = world.workers.get(name) if name else None
    if worker is None:
        return f"{name} (not seen yet)"
    if worker.lost_since_s is not None:
        return f"{name} (lost {now_s - worker.lost_since_s:.0f} s ago)"
    activity = seen.activities.get(seat)
    if activity is None or activity.worker != name:
        return f"{name} (assigned, {now_s - seen.since_s:.0f} s)"
    return f"{name} ({activity.words}, {now_s - activity.since_s:.0f} s)"
