"""An aggregator that is shut out: nothing goes to it any more, nor counts that it made, and its data key ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.ids import NodeName
from services.coordinator.domain.advance import Verdict, advance
from services.coordinator.domain.assignments import assignments
from services.coordinator.domain.epochs import Epoch, holders_of, rotation_due, with_holders
from services.coordinator.domain.explain import waiting_for
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import AggregatorView, Seen, World
from services.coordinator.domain.topology import lost_tier
from services.coordinator.domain.wishes import resume
from tests.unit.coordinator.jobs import AGGREGATED, RULES, accepted, at, collecting, seen, world
from tests.unit.coordinator.test_topology import arranged, network, tree

OTHER = AggregatorView(NodeName("other"), "us", "127.0.0.1:2", is_live=True)
WAITS = "aggregator agg: it was revoked, and the job's versions are there"


def without(everybody: World, name: str) -> World:
    """The same world with an aggregator shut out."""
    views = {
        each.name: replace(each, is_live=each.is_live and each.name != name)
        for each in (*everybody.aggregators.values(), OTHER)
    }
    return replace(everybody, aggregators=views, revoked=frozenset({NodeName(name)}))


def told(job: Job, observed: Seen, everybody: World, after_s: float = 2) -> str | None:
    return waiting_for(job, observed, everybody, RULES, at(after_s).monotonic_s)


@pytest.mark.parametrize("stage", [Stage.COLLECTING, Stage.SEALED])
@pytest.mark.parametrize("facts", [{}, {"aggregated": AGGREGATED}, {"spoilt": "it says so"}, {"fatal": "it says so"}])
def test_a_round_at_it_is_collected_again_whatever_it_says(stage: Stage, facts: dict[str, object]) -> None:
    job = with_holders(replace(collecting("a", "b"), stage=stage))
    observed = replace(accepted(job, 0, 1), **facts)  # type: ignore[arg-type]
    verdict = advance(job, observed, without(world("a", "b"), "agg"), RULES, at(2))
    assert (verdict.job.stage, verdict.job.round, verdict.job.attempt, verdict.job.moves) == (Stage.GATHERING, 1, 2, 1)
    assert verdict.job.version == job.version
    assert [note.name for note in verdict.notes] == ["aggregator_revoked"]


def test_where_the_versions_are_there_the_job_waits_and_says_for_what() -> None:
    job = replace(collecting("a", "b"), stage=Stage.GATHERING, rekey="asked for by ann")
    shut = without(world("a", "b"), "agg")
    assert advance(job, seen(), shut, RULES, at(60)) == Verdict(job)
    assert told(job, seen(trouble="something else"), shut) == f"{WAITS}; a new join token lets it in again"
    assert assignments(job, seen(), shut, RULES, at(2).monotonic_s) == {}
    limit_s = job.spec.aggregation.deadline * RULES.attempts
    failed = advance(job, seen(), shut, RULES, at(limit_s)).job
    assert (failed.stage, failed.error) == (Stage.FAILED, f"waited {limit_s:.0f} s for {WAITS}")


def test_let_in_again_the_job_goes_on_there_under_another_key() -> None:
    job = with_holders(collecting("a", "b"))
    again = advance(job, accepted(job, 0), without(world("a", "b"), "agg"), RULES, at(2)).job
    opened = advance(again, seen(), world("a", "b"), RULES, at(3)).job
    assert (opened.stage, opened.aggregator) == (Stage.COLLECTING, "agg")
    due = rotation_due(opened, Epoch(0, 1, 1, 100.0), RULES, 100.0)
    assert due is not None
    assert (due.reason, due.is_mandatory) == ("aggregator agg was revoked", True)


@pytest.mark.parametrize("stage", [Stage.GATHERING, Stage.TESTING, Stage.PAUSED])
def test_its_key_ends_though_no_round_is_open(stage: Stage) -> None:
    job = replace(with_holders(collecting("a", "b")), stage=stage)
    verdict = advance(job, seen(), without(world("a", "b"), "agg"), RULES, at(2))
    assert verdict.job == replace(job, rekey="aggregator agg was revoked")
    again = advance(verdict.job, seen(), without(world("a", "b"), "agg"), RULES, at(2))
    assert "aggregator_revoked" not in [note.name for note in again.notes], "said once"
    if stage is Stage.PAUSED:
        assert resume(verdict.job, "ann", at(3)).job.rekey == verdict.job.rekey


def test_before_the_first_version_another_takes_over() -> None:
    first = replace(collecting("a", "b"), round=0, cohort=collecting("a", "b").cohort[:1], version=None)
    job, shut = with_holders(first), without(world("a", "b"), "agg")
    again = advance(job, accepted(job, 0), shut, RULES, at(2)).job
    assert assignments(again, seen(), shut, RULES, at(2).monotonic_s) == {}
    opened = advance(again, seen(), shut, RULES, at(2)).job
    assert (opened.aggregator, opened.aggregator_address) == ("other", "127.0.0.1:2")
    assert "aggregator agg" not in holders_of(opened)
    alone = replace(shut, aggregators={NodeName("agg"): shut.aggregators[NodeName("agg")]})
    assert advance(again, seen(), alone, RULES, at(2)) == Verdict(again)
    assert told(again, seen(), alone) == "an aggregator: none is live"


def test_it_is_known_though_discovery_has_forgotten_it() -> None:
    job = collecting("a", "b")
    forgotten = replace(world("a", "b"), aggregators={}, revoked=frozenset({NodeName("agg")}))
    assert advance(job, accepted(job, 0, 1), forgotten, RULES, at(2)).job.stage is Stage.GATHERING
    regional = arranged("eu us", "eu us global")
    known = network("eu us", "eu global")
    assert lost_tier(regional, known) is None
    assert lost_tier(regional, replace(known, revoked=frozenset({NodeName("agg-us")}))) == regional.tiers[1]


def test_a_region_moves_to_another_even_when_the_sum_is_there_already() -> None:
    job = with_holders(replace(arranged("eu us", "eu us global"), stage=Stage.SEALED))
    shut = replace(network("eu us", "eu -us global"), revoked=frozenset({NodeName("agg-us")}))
    again = advance(job, seen(aggregated=AGGREGATED), shut, RULES, at(2)).job
    assert (again.stage, again.attempt) == (Stage.GATHERING, 2)
    opened = advance(again, seen(), shut, RULES, at(2)).job
    assert tree(opened) == {"eu": (0,), "us at agg-global": (1,)}
    assert opened.rekey == "aggregator agg-us was revoked"
    assert holders_of(opened) == {"worker w0", "worker w1", "aggregator agg-eu", "aggregator agg-global"}


def test_a_version_that_is_being_tested_is_not_fetched_from_it() -> None:
    job = replace(collecting("a", "b"), stage=Stage.TESTING)
    now_s = at(2).monotonic_s
    assert assignments(job, seen(), world("a", "b"), RULES, now_s)
    assert assignments(job, seen(), without(world("a", "b"), "agg"), RULES, now_s) == {}
    assert str(told(job, seen(), without(world("a", "b"), "agg"))).startswith(WAITS)
