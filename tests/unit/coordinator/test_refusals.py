"""A worker whose site refuses the job: others are asked, or the job waits and says for what."""

from __future__ import annotations

from dataclasses import replace

from cortex_common.ids import NodeName
from cortex_common.job.site_policy import Refusal
from services.coordinator.attendance import Line
from services.coordinator.domain.advance import advance
from services.coordinator.domain.assignments import Work, assignments
from services.coordinator.domain.explain import waiting_for
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import World
from services.coordinator.shown import status_of
from services.coordinator.tracked import SiteRefused, Tracked
from tests.unit.coordinator.jobs import RULES, accepted, at, collecting, new_job, seen, version, world

RULE = Refusal("max_rounds", "training.rounds 9 wanted; allowed: up to 5")


def refusing(everybody: World, *names: str) -> World:
    return replace(everybody, refused={NodeName(name): (RULE,) for name in names})


def least(job: Job, count: int) -> Job:
    placement = job.spec.placement.model_copy(update={"min_workers": count})
    return replace(job, spec=job.spec.model_copy(update={"placement": placement}))


def test_its_seat_is_given_to_another_at_once_with_the_rule():
    verdict = advance(collecting("a", "b"), seen(), refusing(world("a", "b", "spare"), "b"), RULES, at(0))
    assert verdict.job.seats == ("a", "spare")
    assert "takes over from b (refuses the job by its site's policy: max_rounds: training" in verdict.notes[0].message


def test_who_refuses_is_no_substitute():
    verdict = advance(
        least(collecting("a", "b", "c"), 2), seen(), refusing(world("a", "b", "c", "d"), "c", "d"), RULES, at(0)
    )
    assert [drop.worker for drop in verdict.job.dropped] == ["c"]


def test_without_anybody_else_the_job_waits_and_says_who_refuses():
    everybody = refusing(world("a", "b"), "b")
    verdict = advance(collecting("a", "b"), accepted(collecting("a", "b"), 0), everybody, RULES, at(0))
    assert (verdict.job.stage, verdict.job.attempt - verdict.job.moves) == (Stage.GATHERING, 1)
    job = verdict.job
    assert advance(job, seen(), everybody, RULES, at(60)).job is job
    reason = waiting_for(job, seen(), everybody, RULES, at(60).monotonic_s)
    assert reason == "workers: 1 of 2 ready; refused by b (max_rounds)"
    opened = advance(job, seen(), world("a", "b"), RULES, at(61)).job
    assert (opened.stage, opened.seats) == (Stage.COLLECTING, ("a", "b"))


def test_a_job_that_nobody_takes_fails_with_the_refusals():
    everybody = refusing(world("a", "b", "c"), "a", "b", "c")
    verdict = advance(new_job(), seen(), everybody, RULES, at(1000))
    assert verdict.job.stage is Stage.FAILED
    assert "refused by a (max_rounds), b (max_rounds), c (max_rounds)" in (verdict.job.error or "")


def test_the_first_version_comes_from_a_seat_that_does_not_refuse():
    job = replace(collecting("a", "b", "c"), round=0, version=None, cohort=(0,))
    verdict = advance(job, seen(), refusing(world("a", "b", "c"), "a", "b"), RULES, at(0))
    assert verdict.job.cohort == (2,)


def test_data_that_cannot_move_waits_for_its_site_or_is_left_out():
    local = {"data": {"train": "digits", "partition": {"scheme": "local"}}}
    job = replace(least(collecting("a", "b", "c", **local), 2), stage=Stage.GATHERING, cohort=(), version=version(0))
    verdict = advance(job, seen(), refusing(world("a", "b", "c"), "b"), RULES, at(6))
    assert (verdict.job.seats, verdict.job.cohort) == (("a", "b", "c"), (0, 2))


def test_slices_of_a_site_that_refuses_meanwhile_are_evaluated_by_others():
    job = replace(collecting("a", "b"), stage=Stage.TESTING)
    given = assignments(job, seen(), refusing(world("a", "b"), "b"), RULES, at(0).monotonic_s)
    assert {name: (each.work, each.slices) for name, each in given.items()} == {"a": (Work.EVALUATE, (0, 1))}


def test_the_status_names_worker_rule_and_what_is_allowed():
    status = status_of(collecting("a", "b"), seen(), refusing(world("a", "b"), "b"), at(0), None, None)
    assert [each.model_dump() for each in status.refusals] == [
        {"worker": "b", "rule": "max_rounds", "message": "training.rounds 9 wanted; allowed: up to 5"}
    ]


def test_a_worker_that_attends_anew_is_asked_anew():
    tracked, line = Tracked(new_job(), seen()), Line("eu", "one", 1)
    tracked.refusals[NodeName("a")] = SiteRefused((RULE,), line)
    assert tracked.refused({NodeName("a"): line}) == {"a": (RULE,)}
    assert tracked.refused({NodeName("a"): Line("eu", "one", 1)}) == {}
    assert tracked.refused({}) == {}
