"""Key epochs: which key a round is sealed under, when the next begins, and which are still needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import PreconditionError
from cortex_common.ids import NodeName
from services.coordinator.domain import wishes
from services.coordinator.domain.advance import Now
from services.coordinator.domain.epochs import (
    Epoch,
    Rotation,
    epoch_at,
    needed,
    readable,
    rotation_due,
    with_holders,
)
from services.coordinator.domain.job import Stage, Tier
from services.coordinator.domain.seen import Rules
from tests.unit.coordinator.jobs import collecting, version

RULES = Rules(data_key_age_s=100.0, data_key_rounds=10)
FIRST = Epoch(0, 0, 1, 1000.0)


def test_a_round_goes_on_with_the_present_key() -> None:
    job = with_holders(collecting("a", "b"))
    assert job.key_holders == ("aggregator agg", "worker a", "worker b")
    assert rotation_due(job, FIRST, RULES, 1099.0) is None


def test_who_comes_is_noted_and_who_leaves_ends_the_epoch() -> None:
    job = with_holders(collecting("a", "b"))
    joined = with_holders(replace(job, seats=(*job.seats, NodeName("c"))))
    assert joined.key_holders == ("aggregator agg", "worker a", "worker b", "worker c")
    assert rotation_due(joined, FIRST, RULES, 1000.0) is None
    left = replace(joined, seats=(NodeName("a"), None, NodeName("d")))
    assert rotation_due(with_holders(left), FIRST, RULES, 1000.0) == Rotation(
        "worker b, worker c left", is_mandatory=True
    )


def test_who_only_had_a_seat_within_a_round_is_remembered() -> None:
    job = with_holders(replace(collecting("a", "b"), seats=(NodeName("a"), NodeName("x"))))
    back = with_holders(replace(job, seats=(NodeName("a"), NodeName("b"))))
    assert rotation_due(back, FIRST, RULES, 1000.0) == Rotation("worker x left", is_mandatory=True)


def test_an_aggregator_that_no_longer_serves_a_region_ends_the_epoch() -> None:
    served = replace(collecting("a"), tiers=(Tier("eu", NodeName("agg-eu"), "", (0,)),))
    moved = replace(with_holders(served), tiers=(Tier("eu", NodeName("agg-2"), "", (0,)),))
    assert rotation_due(moved, FIRST, RULES, 1000.0) == Rotation("aggregator agg-eu left", is_mandatory=True)


def test_age_rounds_and_people_end_an_epoch() -> None:
    job = with_holders(collecting("a"))
    assert rotation_due(job, FIRST, RULES, 1100.0) == Rotation("100 s old", is_mandatory=False)
    assert rotation_due(replace(job, round=9), FIRST, RULES, 1000.0) is None
    assert rotation_due(replace(job, round=10), FIRST, RULES, 1000.0) == Rotation(
        "used for 10 rounds", is_mandatory=False
    )
    assert rotation_due(replace(job, round=14), replace(FIRST, from_round=5), RULES, 1000.0) is None
    asked = wishes.rotate_key(job, "ann", Now(0.0, 0.0))
    assert rotation_due(asked.job, FIRST, RULES, 1000.0) == Rotation("asked for by ann", is_mandatory=True)
    assert [note.name for note in asked.notes] == ["key_rotation_asked"]


def test_who_left_ends_an_epoch_that_is_also_old() -> None:
    job = replace(with_holders(collecting("a", "b")), seats=(NodeName("a"), None), round=10)
    assert rotation_due(job, FIRST, RULES, 1100.0) == Rotation("worker b left", is_mandatory=True)


def test_asking_twice_is_asking_once_and_an_ended_job_has_no_next_round() -> None:
    job = wishes.rotate_key(collecting("a"), "ann", Now(0.0, 0.0)).job
    assert wishes.rotate_key(job, "bob", Now(0.0, 0.0)).job is job
    with pytest.raises(PreconditionError, match="completed"):
        wishes.rotate_key(replace(job, stage=Stage.COMPLETED, rekey=""), "ann", Now(0.0, 0.0))


# Epochs that begin with these attempts; a round's attempts count from 1.
PLACES = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 3)), max_size=6, unique=True).map(sorted)


def epochs_of(places: list[tuple[int, int]]) -> list[Epoch]:
    return [FIRST, *(Epoch(*place, number, 0.0) for number, place in enumerate(places, start=2))]


@given(PLACES, st.integers(0, 9), st.integers(1, 4))
def test_an_attempt_has_the_newest_epoch_that_began_before_it(
    places: list[tuple[int, int]], number: int, attempt: int
) -> None:
    epochs = epochs_of(places)
    begun = [each for each in epochs if (each.from_round, each.from_attempt) <= (number, attempt)]
    assert epochs[epoch_at(epochs, number, attempt)] == begun[-1]


@given(PLACES, st.integers(0, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_a_member_can_read_what_was_sealed_since_the_oldest_round_it_reads(
    places: list[tuple[int, int]], made_in: int, made_by: int, attempt: int, later: int
) -> None:
    epochs = epochs_of(places)
    job = replace(collecting("a"), round=made_in + later, attempt=attempt)
    current, older = readable(epochs, job, made_in)
    assert current == epoch_at(epochs, job.round, attempt)
    # Whichever attempt of the round made the version, and everything between.
    for number, by in [(made_in, made_by), *((between, made_by) for between in range(made_in, job.round))]:
        assert epoch_at(epochs, number, by) in (current, *older)
    # And nothing from before that.
    assert all(index >= epoch_at(epochs, made_in, 1) for index in older)
    assert readable(epochs, job, None) == (current, ())


@given(PLACES, st.sets(st.integers(0, 7)), st.integers(1, 3), st.integers(0, 7))
def test_keys_of_kept_versions_and_of_what_workers_carry_stay(
    places: list[tuple[int, int]], kept: set[int], attempt: int, included: int
) -> None:
    epochs = epochs_of(places)
    job = replace(collecting("a"), round=9, version=version(8), included={"a": included, "gone": 0})
    wanted = needed(epochs, job, kept)
    for number in kept:
        assert epochs[epoch_at(epochs, number, attempt)].number in wanted
    for number in range(included, 10):
        assert epochs[epoch_at(epochs, number, attempt)].number in wanted
    ended = needed(epochs, replace(job, stage=Stage.COMPLETED), kept)
    assert ended <= wanted
    assert ended == {epochs[epoch_at(epochs, number, by)].number for number in kept for by in (1, 2, 3)}


def test_a_key_that_only_a_pruned_version_was_sealed_under_is_not_needed() -> None:
    epochs = [FIRST, Epoch(3, 1, 2, 0.0), Epoch(5, 1, 3, 0.0), Epoch(9, 1, 4, 0.0)]
    job = replace(collecting("a"), round=9, version=version(8), included={"a": 8})
    assert needed(epochs, job, {8}) == {3, 4}
    assert needed(epochs, job, {2, 8}) == {1, 3, 4}
    assert needed(epochs, replace(job, stage=Stage.COMPLETED), {2}) == {1}


def test_while_a_job_is_resealed_every_key_stays_and_afterwards_only_the_new_ones_count() -> None:
    epochs = [FIRST, Epoch(3, 1, 2, 0.0), Epoch(6, 1, 3, 0.0), Epoch(9, 1, 4, 0.0)]
    job = replace(collecting("a"), round=9, version=version(8), included={"a": 8}, resealing=True)
    assert needed(epochs, job, {2}) == {1, 2, 3, 4}
    done = replace(job, resealing=False, sealed_since=4)
    assert needed(epochs, done, {2}) == {3, 4}, "what the worker carries is still under the third"
    later = replace(done, round=11, version=version(10), included={"a": 10})
    assert needed([*epochs, Epoch(10, 1, 5, 0.0)], later, {2}) == {4, 5}
    assert needed(epochs, replace(done, stage=Stage.COMPLETED), {2, 8}) == {4}


def test_asking_to_reseal_adds_to_what_was_asked_for() -> None:
    plain = wishes.rotate_key(collecting("a"), "ann", Now(0.0, 0.0)).job
    asked = wishes.rotate_key(plain, "bob", Now(0.0, 0.0), reseal=True).job
    assert (plain.resealing, asked.resealing) == (False, True)
    assert wishes.rotate_key(asked, "ann", Now(0.0, 0.0)).job is asked
