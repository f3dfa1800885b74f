"""A worker that is shut out: what it sent and is not committed is left out, its seat goes to another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.ids import NodeName
from services.coordinator.domain.advance import advance
from services.coordinator.domain.job import Stage
from services.coordinator.domain.seen import World
from tests.unit.coordinator.jobs import AGGREGATED, RULES, accepted, at, collecting, seen, world


def without(everybody: World, name: str) -> World:
    """The same world with a worker shut out."""
    shut_out = replace(everybody.workers[NodeName(name)], is_revoked=True)
    return replace(everybody, workers={**everybody.workers, NodeName(name): shut_out})


def test_its_seat_is_given_to_another_at_once():
    job = collecting("a", "b")
    verdict = advance(job, accepted(job, 0), without(world("a", "b", "spare"), "b"), RULES, at(1))
    assert verdict.job.seats == ("a", "spare")
    assert "takes over from b (revoked)" in verdict.notes[0].message


def test_without_a_substitute_the_round_goes_on_down_to_the_minimum():
    job = collecting("a", "b", "c")
    job = replace(
        job, spec=job.spec.model_copy(update={"placement": job.spec.placement.model_copy(update={"min_workers": 2})})
    )
    verdict = advance(job, accepted(job, 0), without(world("a", "b", "c"), "b"), RULES, at(1))
    assert [(drop.worker, drop.reason) for drop in verdict.job.dropped] == [("b", "revoked")]


def test_an_update_that_was_accepted_is_left_out_by_collecting_the_round_again():
    job = collecting("a", "b")
    verdict = advance(job, accepted(job, 0, 1), without(world("a", "b", "spare"), "b"), RULES, at(2))
    assert (verdict.job.stage, verdict.job.attempt, verdict.job.round) == (Stage.GATHERING, 2, 1)
    assert verdict.notes[0].name == "contribution_excluded"
    again = advance(verdict.job, seen(), without(world("a", "b", "spare"), "b"), RULES, at(2))
    assert again.job.seats == ("a", "spare")


@pytest.mark.parametrize("facts", [{}, {"aggregated": AGGREGATED}])
def test_a_frozen_list_with_its_update_is_not_committed(facts):
    job = collecting("a", "b")
    frozen = advance(job, accepted(job, 0, 1), world("a", "b"), RULES, at(2)).job
    assert frozen.stage is Stage.SEALED
    verdict = advance(frozen, seen(**facts), without(world("a", "b"), "b"), RULES, at(3))
    assert (verdict.job.stage, verdict.job.attempt, verdict.job.sealed) == (Stage.GATHERING, 2, ())


def test_it_costs_no_attempt_however_many_are_shut_out():
    job = replace(collecting("a", "b"), attempt=RULES.attempts)
    verdict = advance(job, accepted(job, 0, 1), without(world("a", "b"), "b"), RULES, at(2))
    assert verdict.job.attempt - verdict.job.moves == RULES.attempts - 1 + 1


def test_what_is_committed_stays():
    job = collecting("a", "b", data={"train": "digits"})
    frozen = advance(job, accepted(job, 0, 1), world("a", "b"), RULES, at(2)).job
    committed = advance(frozen, seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3)).job
    assert committed.included
    assert "contribution_excluded" not in [
        note.name for note in advance(committed, seen(), without(world("a", "b"), "b"), RULES, at(4)).notes
    ]
