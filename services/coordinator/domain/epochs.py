"""Key epochs of a job: which data key a round is sealed under, when the next one begins, which are still needed.

An epoch begins with an attempt of a round and lasts until the next one does; a round that is open keeps the epoch it
was opened with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from services.coordinator.domain.job import Job
from services.coordinator.domain.seen import Rules


@dataclass(frozen=True, slots=True)
class Epoch:
    """The time of one data key: from this attempt of this round on."""

    from_round: int
    from_attempt: int
    number: int
    created_s: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Why a new epoch is due; unless it is mandatory, the old key is only old and does for another round."""

    reason: str
    is_mandatory: bool


def holders_of(job: Job) -> frozenset[str]:
    """Who is given the job's data key now: workers with a seat, and the aggregators of its round."""
    workers = {f"worker {name}" for name in job.seats if name is not None}
    aggregators = {f"aggregator {tier.aggregator}" for tier in job.tiers}
    root = {f"aggregator {job.aggregator}"} if job.aggregator is not None else set()
    return frozenset(workers | aggregators | root)


def with_holders(job: Job) -> Job:
    """The job, with everybody noted who is given the present epoch's key: they only become more while it lasts."""
    holders = tuple(sorted({*job.key_holders, *holders_of(job)}))
    return job if holders == job.key_holders else replace(job, key_holders=holders)


def rotation_due(job: Job, newest: Epoch, rules: Rules, now_s: float) -> Rotation | None:
    """Why a round that is opened now begins a new epoch; None if it does not.

    It must where somebody asked for it, or somebody who was given the old key left.

    Args:
        job: As it is with the round open.
        newest: Its newest epoch.
        rules: How long an epoch may last.
        now_s: Wall-clock seconds.
    """
    if job.rekey:
        return Rotation(job.rekey, is_mandatory=True)
    gone = sorted(set(job.key_holders) - holders_of(job))
    if gone:
        return Rotation(f"{', '.join(gone)} left", is_mandatory=True)
    age_s = now_s - newest.created_s
    if age_s >= rules.data_key_age_s:
        return Rotation(f"{age_s:.0f} s old", is_mandatory=False)
    rounds = job.round - newest.from_round
    if rounds >= rules.data_key_rounds:
        return Rotation(f"used for {rounds} rounds", is_mandatory=False)
    return None


def epoch_at(epochs: Sequence[Epoch], round_number: int, attempt: int) -> int:
    """Index of the epoch of an attempt.

    Args:
        epochs: In order, at least one.
        round_number: Of the job.
        attempt: Of the round.
    """
    begun = [
        index for index, each in enumerate(epochs) if (each.from_round, each.from_attempt) <= (round_number, attempt)
    ]
    return begun[-1] if begun else 0


def readable(epochs: Sequence[Epoch], job: Job, oldest_round: int | None) -> tuple[int, tuple[int, ...]]:
    """Which epochs a member needs for the job's present round: the one to seal with, and older ones to read with.

    Args:
        epochs: Of the job, in order, at least one.
        job: The job.
        oldest_round: What it reads was sealed in this round or later; None: it reads nothing older.

    Returns:
        Indices in `epochs`.
    """
    current = epoch_at(epochs, job.round, job.attempt)
    oldest = current if oldest_round is None else min(current, epoch_at(epochs, oldest_round, 1))
    return current, tuple(range(oldest, current))


def needed(epochs: Sequence[Epoch], job: Job, kept_rounds: Iterable[int]) -> frozenset[int]:
    """Numbers of the epochs that something sealed under them may still be read with.

    Args:
        epochs: Of the job, in order, at least one.
        job: The job; what its members carry from their last included round on counts while it runs.
        kept_rounds: Rounds whose versions stay.
    """
    if job.resealing:
        # Each version may be under its own epoch or already under the newest.
        return frozenset(each.number for each in epochs)
    since = next((index for index, each in enumerate(epochs) if each.number == job.sealed_since), 0)
    found = {max(index, since) for number in kept_rounds for index in _of_round(epochs, number)}
    if not job.stage.is_terminal:
        base = job.version.round if job.version is not None else job.round
        included = [number for name in job.seats if name is not None and (number := job.included.get(name)) is not None]
        found |= set(range(epoch_at(epochs, min([base, *included]), 1), len(epochs)))
    return frozenset(epochs[index].number for index in found)


def _of_round(epochs: Sequence[Epoch], number: int) -> range:
    """All epochs that an attempt of the round may have had."""
    last = max((index for index, each in enumerate(epochs) if each.from_round <= number), default=0)
    return range(epoch_at(epochs, number, 1), last + 1)
