"""Who has to do what right now, derived from the job alone: sending it again does no harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cortex_common.ids import JobId, NodeName, SeatIndex
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.placement import can_evaluate
from services.coordinator.domain.seen import Rules, Seen, World
from services.coordinator.domain.topology import is_cut_off


class Work(StrEnum):
    """What an assignment asks for."""

    INITIALISE = "initialise"
    TRAIN = "train"
    EVALUATE = "evaluate"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A piece of work for one worker; the same `id` is the same work."""

    job_id: JobId
    round: int
    attempt: int
    seat: SeatIndex
    seats: int
    work: Work
    slices: tuple[int, ...] = ()
    retry: int = 0

    @property
    def id(self) -> str:
        """Unique over all jobs, the same after a restart of the coordinator."""
        parts = f"{self.job_id}/{self.round}.{self.attempt}/{self.seat}/{self.work.value}"
        sliced = f"/{','.join(map(str, self.slices))}" if self.slices else ""
        return f"{parts}{sliced}/{self.retry}" if self.retry else f"{parts}{sliced}"


def assignments(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> Mapping[NodeName, Assignment]:
    """Work of every worker that holds a seat of the job; none while its aggregator is shut out."""
    if job.stage.is_terminal or job.stage is Stage.PAUSED or job.aggregator in world.revoked:
        return {}
    if job.stage is Stage.COLLECTING:
        return _seated(job, seen, Work.TRAIN if job.round else Work.INITIALISE)
    if job.stage is Stage.TESTING:
        return _evaluating(job, seen, world, rules, now_s)
    return {name: _assignment(job, SeatIndex(seat), Work.HOLD) for seat, name in enumerate(job.seats) if name}


def rests(job: Job, worker: NodeName, last: Assignment, due: Assignment) -> bool:
    """Whether a worker keeps its last assignment, which it has done, instead of one that only says to hold.

    The next one follows in a moment, and between two rounds a message that asks for nothing costs as much as one that
    asks for work. Whoever's update does not count is told to stop.
    """
    if due.work is not Work.HOLD or last.work is not Work.TRAIN or last.seat != due.seat:
        return False
    if job.stage is Stage.SEALED:
        counts = any((entry.seat, entry.worker) == (last.seat, worker) for entry in job.sealed)
        return counts and (last.round, last.attempt) == (job.round, job.attempt)
    return job.stage is Stage.COLLECTING and last.round == job.round - 1 == job.included.get(worker)


def live_seats(job: Job, world: World, rules: Rules, now_s: float) -> dict[NodeName, SeatIndex]:
    """Holders of seats that are here, and their seats."""
    return {
        name: SeatIndex(seat)
        for seat, name in enumerate(job.seats)
        if name is not None
        and (worker := world.workers.get(name)) is not None
        and worker.is_live(now_s, rules.lease_s)
        and world.is_willing(name)
    }


def evaluators(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> list[NodeName]:
    """Holders of seats that are here and have the test data, and to whom the version can come, if there are any.

    While that is known of none, those that discovery has not told of yet are asked; a few failures are the answer no.
    """
    live = live_seats(job, world, rules, now_s)
    live = {name: seat for name, seat in live.items() if not is_cut_off(job, seat, world)} or live
    able = [name for name in live if can_evaluate(world.workers[name], job.spec)]
    unknown = [name for name in live if not world.workers[name].is_known]
    return able or [name for name in unknown if _failures(seen, live[name], name) < rules.tries]


def nobody_evaluates(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> str:
    """That nobody can evaluate, in words to add to a line; empty if somebody can."""
    if evaluators(job, seen, world, rules, now_s):
        return ""
    seated = sum(1 for name in job.seats if name)
    return f": none of the {seated} with a seat is here and has dataset {job.spec.data.test} (data.test)"


def _assignment(job: Job, seat: SeatIndex, work: Work, retry: int = 0, slices: tuple[int, ...] = ()) -> Assignment:
    return Assignment(job.id, job.round, job.attempt, seat, len(job.seats), work, slices, retry)


def _seated(job: Job, seen: Seen, work: Work) -> dict[NodeName, Assignment]:
    given: dict[NodeName, Assignment] = {}
    for index, name in enumerate(job.seats):
        seat = SeatIndex(index)
        if name is None:
            continue
        if seat in job.cohort and seen.open_seats.get(seat) == name:
            given[name] = _assignment(job, seat, work, retry=_failures(seen, seat, name))
        else:
            given[name] = _assignment(job, seat, Work.HOLD)
    return given


def _failures(seen: Seen, seat: SeatIndex, name: NodeName) -> int:
    return sum(1 for failure in seen.failures.get(seat, ()) if failure.worker == name)


def _evaluating(job: Job, seen: Seen, world: World, rules: Rules, now_s: float) -> dict[NodeName, Assignment]:
    """Slice i goes to the worker of seat i; slices of those that are lost or cannot go to the first that can."""
    live = live_seats(job, world, rules, now_s)
    helpers = evaluators(job, seen, world, rules, now_s)
    share: dict[NodeName, list[int]] = {name: [] for name in live}
    for index, holder in enumerate(job.seats):
        if index not in seen.scores and helpers:
            name = holder if holder in helpers else helpers[index % len(helpers)]
            share[name].append(index)
    given: dict[NodeName, Assignment] = {}
    for name, slices in share.items():
        seat = live[name]
        retry = _failures(seen, seat, name)
        work = Work.EVALUATE if slices else Work.HOLD
        given[name] = _assignment(job, seat, work, retry, tuple(slices))
    return given
