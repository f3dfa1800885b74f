"""The job's state machine: what is, what was seen and what time it is give what comes next, with the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cortex_common.ids import NodeName, SeatIndex, Sha256Hex
from services.coordinator.domain.assignments import nobody_evaluates
from services.coordinator.domain.ending import finish_round
from services.coordinator.domain.job import Contribution, Dropout, Job, Note, Stage, Version
from services.coordinator.domain.placement import choose_aggregator, fill_seats, misfit, no_evaluator, spares
from services.coordinator.domain.reports import round_report, test_metrics
from services.coordinator.domain.seen import AggregatorView, Rules, Seen, WorkerView, World
from services.coordinator.domain.topology import bytes_between_regions, lost_tier, tiers_of, with_used


@dataclass(frozen=True, slots=True)
class Now:
    """Both clocks: monotonic seconds decide, wall seconds are written down."""

    monotonic_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The job after one step, and what to log. `job` is the very object given when nothing changes."""

    job: Job
    notes: tuple[Note, ...] = ()


def advance(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict:
    """Take at most one step.

    Args:
        job: The durable state.
        seen: Observations about the current attempt of the current round.
        world: Everybody, and who has no free place.
        rules: The coordinator's limits.
        now: The time.
    """
    if job.stage.is_terminal:
        return Verdict(job)
    if (without := _without_aggregators(job, world)) is not None:
        return without
    if job.stage is Stage.PAUSED:
        return Verdict(job)
    if seen.fatal is not None:
        return fail(job, seen.fatal, now)
    for failures in seen.failures.values():
        for failure in failures:
            if failure.is_permanent:
                return fail(job, f"worker {failure.worker}: {failure.reason}", now)
    step = {
        Stage.GATHERING: _gather,
        Stage.COLLECTING: _collect,
        Stage.SEALED: _publish,
        Stage.TESTING: _test,
    }[job.stage]
    return step(job, seen, world, rules, now)


def fail(job: Job, reason: str, now: Now) -> Verdict:
    """End the job with the reason."""
    ended = replace(job, stage=Stage.FAILED, error=reason, finished_s=now.wall_s)
    return Verdict(ended, (Note("job_failed", job.round, reason),))


def quorum_of(job: Job) -> int:
    """Updates the round needs: the share asked for, of the cohort as it is now."""
    return max(1, math.ceil(job.spec.aggregation.quorum * len(job.cohort) - 1e-9))


def _gather(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict:
    """Fill the seats; open the round when all are filled, or enough of them for long enough."""
    if job.pausing:
        rested = replace(job, stage=Stage.PAUSED, pausing=False, seats=(), cohort=())
        return Verdict(rested, (Note("job_paused", job.round, "paused as asked"),))
    seats = fill_seats(job, world, rules, now.monotonic_s)
    live = tuple(
        SeatIndex(index)
        for index, name in enumerate(seats)
        if name is not None
        and (worker := world.workers.get(name)) is not None
        and _may_start(job, worker, world, rules, now)
    )
    waited_s = now.monotonic_s - seen.since_s
    untested = no_evaluator((world.workers[name] for seat in live if (name := seats[seat])), job.spec)
    came = len(live) == len(seats) or (len(live) >= job.spec.placement.least and waited_s >= rules.gather_s)
    enough = came and untested is None
    is_regional = job.spec.aggregation.topology == "regional"
    root = choose_aggregator(seats, world, above_regions=is_regional)
    aggregator = _aggregator_of(job, root, world)
    if not enough or aggregator is None:
        if waited_s >= job.spec.aggregation.deadline * rules.attempts and not _is_queued(job, world):
            lacking = None if aggregator is not None else lacking_aggregator(job, world)
            reason = _nobody_came(job, len(live), lacking, untested if came else None, waited_s)
            return fail(job, reason + refused_by(world), now)
        return Verdict(job)
    cohort = live if job.round else live[:1]
    opened = replace(
        job,
        stage=Stage.COLLECTING,
        seats=seats,
        cohort=cohort,
        tiers=tiers_of(replace(job, seats=seats), cohort, aggregator, world),
        dropped=(),
        aggregator=aggregator.name,
        aggregator_address=aggregator.address,
        sealed=(),
        opened_s=now.wall_s,
        started_s=job.started_s or now.wall_s,
    )
    opened = replace(opened, used=with_used(opened))
    names = ", ".join(str(seats[seat]) for seat in opened.cohort)
    what = f"round {job.round} attempt {job.attempt} with {names}" if job.round else f"first version from {names}"
    return Verdict(opened, (Note("round_opened", job.round, f"{what} at {aggregator.name}"),))


def _may_start(job: Job, worker: WorkerView, world: World, rules: Rules, now: Now) -> bool:
    """Whether a seat's worker can begin a round; with regions it must be known which it is in."""
    is_placed = bool(worker.region) or job.spec.aggregation.topology == "flat"
    return is_placed and world.is_willing(worker.name) and worker.is_live(now.monotonic_s, rules.lease_s)


def _is_queued(job: Job, world: World) -> bool:
    """Whether workers that would do are only busy with other jobs."""
    return any(name in world.workers and misfit(world.workers[name], job.spec) is None for name in world.taken)


def _aggregator_of(job: Job, root: AggregatorView | None, world: World) -> AggregatorView | None:
    """The job's aggregator: its versions are there. Its last address will do while discovery is away.

    A job that has none yet takes the root given, and so does one without a version whose aggregator was shut out.
    """
    name = job.aggregator
    if name is None or (name in world.revoked and job.version is None):
        return root
    if name in world.revoked:
        return None
    return world.aggregators.get(name) or AggregatorView(name, "", job.aggregator_address, is_live=True)


def lacking_aggregator(job: Job, world: World) -> str:
    """Why there is no aggregator for the job's next round."""
    if job.aggregator in world.revoked and job.version is not None:
        return f"aggregator {job.aggregator}: it was revoked, and the job's versions are there"
    return "an aggregator: none is live"


def _nobody_came(job: Job, live: int, lacking: str | None, untested: str | None, waited_s: float) -> str:
    if lacking is not None:
        return f"waited {waited_s:.0f} s for {lacking}"
    if untested is not None:
        return f"{untested}, and no other came within {waited_s:.0f} s"
    return f"{live} of {job.spec.placement.least} workers needed came within {waited_s:.0f} s"


def _collect(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict:
    """Wait for updates; replace, drop or wait for lost workers; freeze the list; give up at the deadline."""
    elsewhere = _without_revoked(job, seen.accepted.values(), world) or _serve_region_elsewhere(job, world)
    if elsewhere is not None:
        return elsewhere
    accepted = {seat: got for seat, got in seen.accepted.items() if seat in job.cohort}
    if (again := _without_doubles(job, accepted.values())) is not None:
        return again
    missing = [seat for seat in job.cohort if seat not in accepted]
    enough = len(accepted) >= quorum_of(job)
    if enough and not missing and _reports_are_in(job, seen, rules, now):
        return _freeze(job, seen, accepted, (), "every member reported")
    age_s = now.monotonic_s - seen.since_s
    limits = job.spec.aggregation
    if enough and missing and (_since_quorum_s(job, seen, now) >= limits.grace or age_s >= limits.deadline):
        left = tuple(Dropout(seat, job.members[seat], "too late: the quorum was reached") for seat in missing)
        return _freeze(job, seen, accepted, left, f"quorum reached, {len(missing)} left behind")
    if age_s >= job.spec.aggregation.deadline:
        return _retry(job, f"{len(accepted)} of {quorum_of(job)} updates needed came within the deadline", rules, now)
    return _mend_cohort(job, seen, world, rules, now) or Verdict(job)


def _reports_are_in(job: Job, seen: Seen, rules: Rules, now: Now) -> bool:
    """Workers tell what they measured right after their update is accepted; that is worth a short wait, not more."""
    if job.round == 0 or all(seat in seen.trained for seat in job.cohort):
        return True
    return now.monotonic_s - max(seen.accepted_at.values(), default=now.monotonic_s) >= rules.report_s


def _since_quorum_s(job: Job, seen: Seen, now: Now) -> float:
    """Seconds since the update that made the quorum was accepted; 0 without a quorum."""
    times = sorted(at_s for seat, at_s in seen.accepted_at.items() if seat in job.cohort)
    quorum = quorum_of(job)
    return now.monotonic_s - times[quorum - 1] if len(times) >= quorum else 0.0


def _mend_cohort(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict | None:
    """Deal with the first member that is gone or keeps failing; None when all is well or only waiting helps."""
    # An update may come in after its seat was given on: whoever has one in takes no other seat of the round.
    spent = _spent(seen, rules) | {entry.worker for entry in seen.accepted.values()}
    for seat, name in job.members.items():
        if seat in seen.accepted:
            continue
        reason = _trouble_of(seat, name, seen, world, rules, now)
        if reason is None:
            continue
        if job.round == 0 and (other := _other_seat(job, seat, spent, world, rules, now)) is not None:
            note = Note(
                "seat_given_on", 0, f"the first version comes from {job.seats[other]} instead of {name} ({reason})"
            )
            return Verdict(replace(job, cohort=(other,)), (note,))
        substitute = _substitute(job, spent, world, rules, now)
        if substitute is not None:
            seats = tuple(substitute if index == seat else held for index, held in enumerate(job.seats))
            note = Note("seat_given_on", job.round, f"seat {seat}: {substitute} takes over from {name} ({reason})")
            return Verdict(replace(job, seats=seats), (note,))
        if job.round and len(job.cohort) - 1 >= job.spec.placement.least:
            cohort = tuple(other for other in job.cohort if other != seat)
            dropped = (*job.dropped, Dropout(seat, name, reason))
            note = Note("seat_dropped", job.round, f"seat {seat}: goes on without {name} ({reason})")
            return Verdict(replace(job, cohort=cohort, dropped=dropped), (note,))
        if not world.is_willing(name):
            return Verdict(_collected_again(job), (Note("seat_refused", job.round, f"{name} {reason}"),))
        if len(seen.failures.get(seat, ())) >= rules.tries:
            return fail(job, f"worker {name}: {reason}", now)
    return None


def _spent(seen: Seen, rules: Rules) -> frozenset[NodeName]:
    """Workers that have failed as often as they may in this attempt."""
    count = Counter(failure.worker for failures in seen.failures.values() for failure in failures)
    return frozenset(name for name, failures in count.items() if failures >= rules.tries)


def _trouble_of(seat: SeatIndex, name: NodeName, seen: Seen, world: World, rules: Rules, now: Now) -> str | None:
    failures = [failure for failure in seen.failures.get(seat, ()) if failure.worker == name]
    if not world.is_willing(name):
        return f"refuses the job by its site's policy: {'; '.join(map(str, world.refused[name]))}"
    if len(failures) >= rules.tries:
        return f"failed {len(failures)} times, last: {failures[-1].reason}"
    worker = world.workers.get(name)
    if worker is not None and worker.is_revoked:
        return "revoked"
    if worker is None:
        return "not seen" if now.monotonic_s - seen.since_s >= rules.lease_s else None
    return None if worker.is_live(now.monotonic_s, rules.lease_s) else "lost: its lease ran out"


def refused_by(world: World) -> str:
    """Whose sites refuse the job and by which rules, in words to add to a line; empty if none does."""
    told = [f"{name} ({', '.join(each.rule for each in rules)})" for name, rules in sorted(world.refused.items())]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return f"; refused by {', '.join(told[:3])}{more}" if told else ""


def _substitute(job: Job, spent: frozenset[NodeName], world: World, rules: Rules, now: Now) -> NodeName | None:
    if job.round and job.spec.data.partition.scheme == "local":
        return None
    seated = spent | frozenset(name for name in job.seats if name)
    return next(spares(job, world, seated, rules, now.monotonic_s), None)


def _other_seat(
    job: Job, seat: SeatIndex, spent: frozenset[NodeName], world: World, rules: Rules, now: Now
) -> SeatIndex | None:
    """A seat whose worker lives, other than the one given."""
    for index, name in enumerate(job.seats):
        worker = world.workers.get(name) if name is not None and index != seat and name not in spent else None
        if worker is not None and _may_start(job, worker, world, rules, now):
            return SeatIndex(index)
    return None


def _freeze(
    job: Job, seen: Seen, accepted: Mapping[SeatIndex, Contribution], left: tuple[Dropout, ...], reason: str
) -> Verdict:
    trained = {
        seat: told for seat, told in seen.trained.items() if seat in accepted and told.worker == accepted[seat].worker
    }
    sealed = tuple(replace(accepted[seat], trained=trained.get(seat)) for seat in sorted(accepted))
    frozen = replace(job, stage=Stage.SEALED, sealed=sealed, dropped=job.dropped + left)
    return Verdict(frozen, (Note("round_sealed", job.round, f"{len(sealed)} updates: {reason}"),))


def _without_revoked(job: Job, given: Iterable[Contribution], world: World) -> Verdict | None:
    """A round that holds something from a worker that was shut out meanwhile is collected again, without it."""
    revoked = sorted(
        {entry.worker for entry in given if entry.worker in world.workers and world.workers[entry.worker].is_revoked}
    )
    if not revoked:
        return None
    what = f"what {', '.join(revoked)} sent is left out: revoked"
    return Verdict(_collected_again(job), (Note("contribution_excluded", job.round, what),))


def _without_doubles(job: Job, given: Iterable[Contribution]) -> Verdict | None:
    """A worker counts once: its update came in after its seat was given on, and it had been given another seat."""
    count = Counter(entry.worker for entry in given)
    doubles = sorted(name for name, updates in count.items() if updates > 1)
    if not doubles:
        return None
    what = f"there are updates of {', '.join(doubles)} for more seats than one: collected again"
    return Verdict(_collected_again(job), (Note("round_retried", job.round, what),))


def _without_aggregators(job: Job, world: World) -> Verdict | None:
    """An aggregator that was shut out loses the round that it serves, open or frozen, and the data key it was given."""
    serving = world.revoked.intersection((job.aggregator, *(tier.aggregator for tier in job.tiers)))
    holding = {name for name in world.revoked if f"aggregator {name}" in job.key_holders}
    is_under_way = bool(serving) and job.stage in (Stage.COLLECTING, Stage.SEALED)
    if not is_under_way and (not holding or job.rekey):
        return None
    why = f"aggregator {', '.join(sorted(serving | holding))} was revoked"
    job = replace(job, rekey=job.rekey or why)
    if not is_under_way:
        return Verdict(job, (Note("aggregator_revoked", job.round, f"{why}: the next round has a new data key"),))
    what = f"{why}: the round is collected again, under a new data key"
    return Verdict(_collected_again(job), (Note("aggregator_revoked", job.round, what),))


def _collected_again(job: Job) -> Job:
    """The round once more, by no fault of its own: workers send what they have."""
    again = replace(job, stage=Stage.GATHERING, attempt=job.attempt + 1, moves=job.moves + 1)
    return replace(again, cohort=(), dropped=(), sealed=())


def _serve_region_elsewhere(job: Job, world: World) -> Verdict | None:
    """A region whose aggregator is gone is collected again by another; its workers send what they have."""
    lost = lost_tier(job, world)
    if lost is None:
        return None
    what = f"region {lost.region}: aggregator {lost.aggregator} is gone, another takes over"
    return Verdict(_collected_again(job), (Note("region_moved", job.round, what),))


def _retry(job: Job, reason: str, rules: Rules, now: Now) -> Verdict:
    made = job.attempt - job.moves
    if made >= rules.attempts:
        return fail(job, f"round {job.round}: {reason}, {made} attempts made", now)
    again = replace(job, stage=Stage.GATHERING, attempt=job.attempt + 1, cohort=(), dropped=(), sealed=())
    return Verdict(again, (Note("round_retried", job.round, f"{reason}; trying again"),))


def _publish(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict:
    """Take over the version the aggregator made."""
    if seen.spoilt is not None:
        return _retry(job, seen.spoilt, rules, now)
    if (without := _without_revoked(job, job.sealed, world)) is not None:
        return without
    if seen.aggregated is None and (elsewhere := _serve_region_elsewhere(job, world)):
        return elsewhere
    made = seen.aggregated
    if made is None:
        return Verdict(job)
    version = Version(
        round=job.round,
        sha256=Sha256Hex(made.sha256),
        manifest_sha256=Sha256Hex(made.manifest_sha256),
        parameters=made.parameters,
        size_bytes=made.size_bytes,
        metrics={},
        created_s=now.wall_s,
    )
    note = Note("version_made", job.round, f"{made.sha256[:12]} ({made.parameters} parameters)")
    if job.round == 0:
        first = replace(job, stage=Stage.GATHERING, round=1, attempt=1, moves=0, version=version, cohort=(), sealed=())
        return Verdict(first, (note,))
    crossing = bytes_between_regions(job, made.hops, world)
    report = round_report(job, version, now.wall_s, crossing)
    included = {**job.included, **{entry.worker: job.round for entry in job.sealed}}
    made_job = replace(job, version=replace(version, metrics=report.metrics), pending=report)
    seats = tuple(entry.seat for entry in job.sealed)
    made_job = replace(made_job, included=included, base_seats=seats)
    if job.spec.data.test is not None:
        return Verdict(replace(made_job, stage=Stage.TESTING), (note,))
    finished, notes = finish_round(made_job, report, now.wall_s)
    return Verdict(finished, (note, *notes))


def _test(job: Job, seen: Seen, world: World, rules: Rules, now: Now) -> Verdict:
    """Add up the slices of the test set; a slice whose worker is lost is evaluated by another (see assignments)."""
    if job.pending is None or job.version is None:
        return fail(job, "stored state is inconsistent: testing without a version", now)
    slices = len(job.seats)
    scores = {index: seen.scores[index] for index in range(slices) if index in seen.scores}
    if len(scores) < slices:
        for failures in seen.failures.values():
            if len(failures) >= rules.tries * 2:
                return fail(job, f"evaluation: worker {failures[-1].worker}: {failures[-1].reason}", now)
        if now.monotonic_s - seen.since_s >= job.spec.aggregation.deadline * rules.attempts:
            left = f"evaluation: {slices - len(scores)} of {slices} slices missing at the deadline"
            return fail(job, left + nobody_evaluates(job, seen, world, rules, now.monotonic_s), now)
        return Verdict(job)
    metrics = {**job.pending.metrics, **test_metrics(scores)}
    started_s = job.opened_s if job.opened_s is not None else now.wall_s
    report = job.pending.model_copy(update={"metrics": metrics, "seconds": max(0.0, now.wall_s - started_s)})
    tested = replace(job, version=replace(job.version, metrics=metrics))
    finished, notes = finish_round(tested, report, now.wall_s)
    return Verdict(finished, notes)
