"""What a worker should be doing, given what it was told: pure decisions.

The coordinator's word is level-triggered: each message lists everything wanted now, and may repeat it. So work is known
by its `key`: the same key is the same work under whatever assignment id it comes, and is neither begun nor reported
twice because it was asked for twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cortex_common.ids import JobId, SeatIndex
from cortex_common.network.work import Assignment, Evaluated, Failed, Hold, Trained, WorkKey
from cortex_common.security.objects import ObjectHeader


@dataclass(frozen=True, slots=True)
class Held:
    """The trainer is warm."""


Outcome = Trained | Evaluated | Failed | Held


@dataclass(frozen=True, slots=True)
class Finished:
    """Work that is over, and under which assignment it was done."""

    assignment_id: str
    outcome: Outcome


class Carry(Enum):
    """What of the last update sent goes into the next one."""

    REPEAT = "the very same numbers are sent again"
    ERROR = "what its quantisation left out"
    WHOLE = "all of it"
    NOTHING = "nothing"


def carry_of(
    kept: ObjectHeader, due: ObjectHeader, included_round: int | None, base_seats: frozenset[SeatIndex]
) -> Carry:
    """What to carry from the last update sent into the one that is due: nothing may come into a version twice.

    Of a lost update only the worker that has the same seat again carries what it holds: whoever else was given that
    seat may hold an update for it too, and a seat comes into a version once.

    Args:
        kept: The last update sent.
        due: The next one.
        included_round: Last round whose version holds an update of this worker; None if none does.
        base_seats: Seats whose updates, whoever sent them, are in the base version.
    """
    if kept.round == due.round:
        is_same = (kept.seat, kept.base_sha256) == (due.seat, due.base_sha256)
        return Carry.REPEAT if is_same else Carry.NOTHING
    if kept.round == included_round:
        return Carry.ERROR
    was_lost = kept.round == due.round - 1 and kept.seat not in base_seats
    return Carry.WHOLE if was_lost and kept.seat == due.seat else Carry.NOTHING


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Which jobs to end and to begin, and which assignments find no place."""

    end: tuple[JobId, ...]
    begin: tuple[JobId, ...]
    refused: tuple[Assignment, ...]


def plan_jobs(wanted: Sequence[Assignment], present: Collection[JobId], slots: int) -> JobPlan:
    """Fit jobs into the slots: those present stay while they are wanted, others take the free places in order."""
    jobs = list(dict.fromkeys(assignment.job_id for assignment in wanted))
    end = tuple(job for job in present if job not in jobs)
    free = slots - (len(present) - len(end))
    new = [job for job in jobs if job not in present]
    begin = tuple(new[:free])
    refused = tuple(assignment for assignment in wanted if assignment.job_id in new[free:])
    return JobPlan(end, begin, refused)


def next_work(wanted: Sequence[Assignment], finished: Mapping[WorkKey, Finished]) -> Assignment | None:
    """The first of a job's assignments that is still to be done; holding comes last."""
    open_ = [assignment for assignment in wanted if not is_finished(assignment, finished)]
    return next((each for each in open_ if not isinstance(each.work, Hold)), open_[0] if open_ else None)


def is_finished(assignment: Assignment, finished: Mapping[WorkKey, Finished]) -> bool:
    """Whether the work is over. A failure holds for its own assignment only: asked anew, it is tried anew."""
    done = finished.get(assignment.key)
    if done is None:
        return False
    return not isinstance(done.outcome, Failed) or done.assignment_id == assignment.assignment_id


def forget_old(finished: Mapping[WorkKey, Finished], wanted: Sequence[Assignment]) -> dict[WorkKey, Finished]:
    """What is worth remembering: outcomes of the newest round wanted and the one before it."""
    newest = max((assignment.round for assignment in wanted), default=0)
    return {key: done for key, done in finished.items() if key.round >= newest - 1}
