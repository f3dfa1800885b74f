"""The job's state machine, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.errors import PreconditionError
from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain import reports
from services.coordinator.domain.advance import advance
from services.coordinator.domain.explain import waiting_for
from services.coordinator.domain.job import Stage, Tier
from services.coordinator.domain.seen import AggregatorView, Dataset, Failure, SliceScore
from services.coordinator.domain.wishes import cancel, pause, resume
from tests.unit.coordinator.jobs import (
    AGGREGATED,
    RULES,
    accepted,
    at,
    collecting,
    new_job,
    scores,
    seen,
    trained,
    update,
    worker,
    world,
)


def test_a_job_starts_when_all_its_seats_are_filled():
    verdict = advance(new_job(), seen(), world("a", "b", "c"), RULES, at(0))
    assert verdict.job.stage is Stage.COLLECTING
    assert verdict.job.seats == ("a", "b", "c")
    assert verdict.job.cohort == (0,), "round 0 makes the first version: one worker is enough"
    assert verdict.job.aggregator == "agg"


def test_a_job_waits_for_the_workers_it_needs():
    job = new_job()
    assert advance(job, seen(), world("a", "b"), RULES, at(60)).job is job


def test_a_job_waits_for_somebody_who_can_evaluate_and_fails_with_the_reason():
    job = new_job(aggregation={"deadline": 10})
    only = {NodeName(name): worker(name, datasets={"digits": Dataset(64, 10)}) for name in "abc"}
    network = replace(world("a", "b", "c"), workers=only)
    assert advance(job, seen(), network, RULES, at(9)).job is job
    ended = advance(job, seen(), network, RULES, at(10 * RULES.attempts)).job
    assert ended.error == (
        "none of 3 workers has dataset digits-test to evaluate with (data.test), and no other came within 30 s"
    )
    joined = replace(network, workers={**only, NodeName("d"): worker("d")})
    assert advance(job, seen(), joined, RULES, at(9)).job.seats == ("a", "b", "d")


def test_a_job_starts_with_its_minimum_after_a_short_wait():
    job = new_job(placement={"workers": 3, "min_workers": 2})
    assert advance(job, seen(), world("a", "b"), RULES, at(1)).job is job
    opened = advance(job, seen(), world("a", "b"), RULES, at(RULES.gather_s)).job
    assert opened.seats == ("a", "b", None)


def test_a_job_nobody_comes_for_fails_with_the_count():
    job = new_job(aggregation={"deadline": 10})
    verdict = advance(job, seen(), world("a"), RULES, at(10 * RULES.attempts))
    assert verdict.job.stage is Stage.FAILED
    assert "1 of 3 workers" in (verdict.job.error or "")


def test_taken_workers_are_not_taken_again():
    job = new_job(placement={"workers": 2})
    everybody = replace(world("a", "b", "c"), taken=frozenset({NodeName("a")}))
    assert advance(job, seen(), everybody, RULES, at(0)).job.seats == ("b", "c")


def test_a_round_is_sealed_when_every_member_has_reported():
    job = collecting("a", "b")
    verdict = advance(job, accepted(job, 1, 0), world("a", "b"), RULES, at(2))
    assert verdict.job.stage is Stage.SEALED
    assert [entry.seat for entry in verdict.job.sealed] == [0, 1], "in seat order, whatever came first"


def test_a_round_waits_a_little_for_the_last_report():
    job = collecting("a", "b")
    observed = replace(accepted(job, 0, 1), trained={})
    assert advance(job, observed, world("a", "b"), RULES, at(1.5)).job is job
    assert advance(job, observed, world("a", "b"), RULES, at(1 + RULES.report_s)).job.stage is Stage.SEALED


def test_a_straggler_is_left_behind_after_quorum_and_grace():
    job = collecting("a", "b", aggregation={"quorum": 0.5, "grace": 5})
    observed = accepted(job, 0, at_s=1001.0)
    assert advance(job, observed, world("a", "b"), RULES, at(5.9)).job is job
    verdict = advance(job, observed, world("a", "b"), RULES, at(6.0))
    assert verdict.job.stage is Stage.SEALED
    assert [(drop.worker, drop.reason) for drop in verdict.job.dropped] == [("b", "too late: the quorum was reached")]


def test_without_quorum_at_the_deadline_the_round_is_tried_again_then_the_job_fails():
    job = collecting("a", "b", aggregation={"deadline": 30})
    verdict = advance(job, accepted(job, 0), world("a", "b"), RULES, at(30))
    assert (verdict.job.stage, verdict.job.attempt) == (Stage.GATHERING, 2)
    last = replace(job, attempt=RULES.attempts)
    verdict = advance(last, accepted(job, 0), world("a", "b"), RULES, at(30))
    assert verdict.job.stage is Stage.FAILED
    assert "1 of 2 updates" in (verdict.job.error or "")


def test_a_lost_worker_is_waited_for_until_its_lease_is_over():
    job = collecting("a", "b")
    assert advance(job, accepted(job, 0), world("a", "b", "spare", b=1000.0), RULES, at(9)).job is job


def test_a_spare_worker_takes_the_seat_of_a_lost_one():
    job = collecting("a", "b")
    verdict = advance(job, accepted(job, 0), world("a", "b", "spare", b=1000.0), RULES, at(RULES.lease_s))
    assert verdict.job.seats == ("a", "spare")
    assert verdict.job.stage is Stage.COLLECTING


def test_a_worker_whose_update_is_in_takes_no_other_seat_of_the_round():
    job = collecting("new", "b", "c")
    # Of "old", whose seat was given on while it was uploading.
    came_late = seen(accepted={SeatIndex(0): update(0, "old")}, accepted_at={SeatIndex(0): 1001.0})
    everybody = ("new", "b", "c", "old")
    waiting = advance(job, came_late, world(*everybody, b=1000.0), RULES, at(RULES.lease_s))
    assert waiting.job is job
    verdict = advance(job, came_late, world(*everybody, "spare", b=1000.0), RULES, at(RULES.lease_s))
    assert verdict.job.seats == ("new", "spare", "c")


def test_a_round_that_holds_two_updates_of_a_worker_is_collected_again():
    job = collecting("new", "old", "c")
    twice = {SeatIndex(0): update(0, "old"), SeatIndex(1): update(1, "old"), SeatIndex(2): update(2, "c")}
    verdict = advance(job, seen(accepted=twice), world("new", "old", "c"), RULES, at(3))
    assert (verdict.job.stage, verdict.job.attempt, verdict.job.moves) == (Stage.GATHERING, 2, 1)
    assert "old" in verdict.notes[0].message


def test_a_seat_with_local_data_is_never_given_to_another():
    job = collecting("a", "b", data={"train": "digits", "partition": {"scheme": "local"}})
    assert advance(job, accepted(job, 0), world("a", "b", "spare", b=1000.0), RULES, at(60)).job is job


def test_a_lost_worker_whose_update_is_in_is_not_replaced():
    job = collecting("a", "b")
    verdict = advance(job, accepted(job, 0, 1), world("a", "b", "spare", b=1000.0), RULES, at(60))
    assert verdict.job.stage is Stage.SEALED
    assert [entry.worker for entry in verdict.job.sealed] == ["a", "b"]


def test_the_round_goes_on_without_a_lost_worker_down_to_the_minimum():
    job = collecting("a", "b")
    job = replace(job, spec=new_job(placement={"workers": 2, "min_workers": 1}).spec)
    verdict = advance(job, accepted(job, 0), world("a", "b", b=1000.0), RULES, at(RULES.lease_s))
    assert verdict.job.cohort == (0,)
    assert verdict.job.dropped[0].worker == "b"
    assert advance(verdict.job, accepted(job, 0), world("a"), RULES, at(11)).job.stage is Stage.SEALED


def test_wait_for_all_waits_for_a_lost_worker_without_a_substitute():
    job = collecting("a", "b")
    assert advance(job, accepted(job, 0), world("a", "b", b=1000.0), RULES, at(60)).job is job


def test_the_first_version_comes_from_another_seat_when_its_worker_is_lost():
    job = replace(collecting("a", "b"), round=0, cohort=(SeatIndex(0),), version=None)
    verdict = advance(job, seen(), world("a", "b", a=1000.0), RULES, at(RULES.lease_s))
    assert verdict.job.cohort == (1,)
    assert verdict.job.seats == ("a", "b")


def test_a_permanent_failure_ends_the_job_with_the_workers_words():
    job = collecting("a", "b")
    failure = Failure(NodeName("a"), "training diverged", is_permanent=True)
    verdict = advance(job, seen(failures={SeatIndex(0): (failure,)}), world("a", "b"), RULES, at(1))
    assert verdict.job.stage is Stage.FAILED
    assert verdict.job.error == "worker a: training diverged"


def test_a_worker_that_keeps_failing_is_replaced_then_the_job_fails():
    job = collecting("a", "b")
    failures = {SeatIndex(0): (Failure(NodeName("a"), "trainer died", is_permanent=False),) * RULES.tries}
    verdict = advance(job, seen(failures=failures), world("a", "b", "spare"), RULES, at(1))
    assert verdict.job.seats == ("spare", "b")
    verdict = advance(job, seen(failures=failures), world("a", "b"), RULES, at(1))
    assert "trainer died" in (verdict.job.error or "")


def test_the_first_version_leads_to_round_one():
    job = replace(collecting("a", "b"), stage=Stage.SEALED, round=0, version=None)
    verdict = advance(job, seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(1))
    assert (verdict.job.stage, verdict.job.round) == (Stage.GATHERING, 1)
    assert verdict.job.version is not None
    assert verdict.job.history == ()


def _sealed(**sections):
    job = collecting("a", "b", **sections)
    return advance(job, accepted(job, 0, 1), world("a", "b"), RULES, at(2)).job


def test_a_version_is_tested_when_there_is_a_test_set():
    verdict = advance(_sealed(), seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3))
    assert verdict.job.stage is Stage.TESTING
    assert verdict.job.pending is not None
    assert verdict.job.pending.metrics["train_loss"] == pytest.approx(0.5)


def test_a_round_ends_with_the_sums_of_all_slices():
    job = advance(_sealed(), seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3)).job
    assert advance(job, seen(scores=scores(90)), world("a", "b"), RULES, at(4)).job is job
    ended = advance(job, seen(scores=scores(90, 70)), world("a", "b"), RULES, at(5)).job
    assert (ended.stage, ended.round) == (Stage.GATHERING, 2)
    report = ended.history[0]
    assert report.metrics["test_accuracy"] == pytest.approx(0.8)
    assert report.metrics["test_loss"] == pytest.approx(0.5)
    assert (report.accepted, report.participants, report.bytes_up, report.bytes_down) == (2, 2, 200, 100)
    assert report.seconds == pytest.approx(5.0)
    assert ended.version is not None
    assert ended.version.metrics == report.metrics


def test_the_last_round_completes_the_job():
    job = _sealed(data={"train": "digits"}, training={"rounds": 1})
    verdict = advance(job, seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3))
    assert verdict.job.stage is Stage.COMPLETED
    assert verdict.job.finished_s == 103.0


def test_a_list_the_aggregator_has_lost_is_collected_again():
    verdict = advance(_sealed(), seen(spoilt="seat 1 is not accepted here"), world("a", "b"), RULES, at(3))
    assert (verdict.job.stage, verdict.job.attempt, verdict.job.sealed) == (Stage.GATHERING, 2, ())


def test_a_pause_takes_effect_after_the_round():
    job = pause(_sealed(data={"train": "digits"}), "ann", at(2)).job
    assert job.stage is Stage.SEALED
    rested = advance(job, seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3)).job
    assert rested.stage is Stage.PAUSED
    assert rested.seats == (), "its workers are free for others"
    assert advance(rested, seen(), world("a", "b"), RULES, at(999)).job is rested
    assert resume(rested, "ann", at(4)).job.stage is Stage.GATHERING


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED])
def test_an_ended_job_never_changes(stage):
    job = replace(collecting("a", "b"), stage=stage)
    observed = replace(accepted(job, 0, 1), aggregated=AGGREGATED, fatal="x")
    assert advance(job, observed, world("a", "b"), RULES, at(999)).job is job


def test_cancelling_ends_the_job_at_once():
    assert cancel(collecting("a", "b"), "ann", at(1)).job.stage is Stage.CANCELLED


def test_what_has_ended_can_neither_be_paused_nor_cancelled_nor_resumed():
    ended = replace(collecting("a", "b"), stage=Stage.COMPLETED)
    for wish in (cancel, pause, resume):
        with pytest.raises(PreconditionError, match="completed"):
            wish(ended, "ann", at(1))


def test_a_wish_repeated_changes_nothing():
    cancelled = cancel(collecting("a", "b"), "ann", at(1)).job
    assert cancel(cancelled, "ann", at(2)).job is cancelled
    pausing = pause(collecting("a", "b"), "ann", at(1)).job
    assert pause(pausing, "ann", at(2)).job is pausing
    assert resume(pausing, "ann", at(3)).job.pausing is False


def settled(job, observed, network, at_s=1.0):
    """Advance until nothing changes any more."""
    for _ in range(50):
        after = advance(job, observed, network, RULES, at(at_s)).job
        if after is job:
            return job
        job = after
    raise AssertionError("the machine does not come to rest")


def failed(*names):
    return {SeatIndex(0): tuple(Failure(NodeName(name), "disk full", is_permanent=False) for name in names)}


def test_a_seat_does_not_go_back_and_forth_between_workers_that_all_fail():
    job = collecting("a", "b")
    observed = seen(open_seats=job.members, failures=failed(*["a"] * RULES.tries, *["c"] * RULES.tries))
    assert settled(job, observed, world("a", "b", "c")).stage is Stage.FAILED


def test_the_first_version_does_not_go_back_and_forth_either():
    job = replace(collecting("a", "b"), round=0, cohort=(SeatIndex(0),), version=None)
    observed = seen(failures=failed(*["a"] * RULES.tries, *["b"] * RULES.tries))
    assert settled(job, observed, world("a", "b")).stage is Stage.FAILED


def test_the_deadline_comes_before_any_mending():
    job = collecting("a", "b", aggregation={"deadline": 30})
    verdict = advance(job, seen(failures=failed(*["a"] * RULES.tries)), world("a", "b", "c"), RULES, at(30))
    assert (verdict.job.stage, verdict.job.attempt) == (Stage.GATHERING, 2)


def test_a_job_behind_another_waits_its_turn_without_a_limit():
    job = new_job(aggregation={"deadline": 10})
    busy = replace(world("a", "b", "c"), taken=frozenset({NodeName("a"), NodeName("b"), NodeName("c")}))
    assert advance(job, seen(), busy, RULES, at(10_000)).job is job


def test_a_job_asked_to_pause_rests_before_its_next_round():
    job = replace(new_job(), pausing=True, round=1)
    assert advance(job, seen(), world("a", "b", "c"), RULES, at(0)).job.stage is Stage.PAUSED


def regional(*, root_lives: bool = True, tier_lives: bool = True):
    """A collecting job with the root in eu and a tier in us, and the network it is in."""
    job = collecting("a", "b", aggregation={"topology": "regional"})
    tiers = (
        Tier("eu", NodeName("agg"), "127.0.0.1:1", (SeatIndex(0),)),
        Tier("us", NodeName("agg-us"), "127.0.0.1:2", (SeatIndex(1),)),
    )
    network = world("a", "b")
    views = {
        NodeName("agg"): AggregatorView(NodeName("agg"), "eu", "127.0.0.1:1", is_live=root_lives),
        NodeName("agg-us"): AggregatorView(NodeName("agg-us"), "us", "127.0.0.1:2", is_live=tier_lives),
    }
    return replace(job, tiers=tiers), replace(network, aggregators=views)


def test_a_region_moves_when_its_aggregator_is_gone_and_that_is_no_failed_attempt():
    job, network = regional(tier_lives=False)
    moved = advance(job, seen(), network, RULES, at(1)).job
    assert (moved.stage, moved.attempt, moved.moves) == (Stage.GATHERING, 2, 1)
    again = replace(job, attempt=RULES.attempts + 1, moves=RULES.attempts)
    late = advance(again, seen(), regional()[1], RULES, at(300)).job
    assert late.stage is Stage.GATHERING, "one attempt was made, the others were moves"


def test_without_the_root_a_regional_job_waits_and_says_so():
    job, network = regional(root_lives=False)
    assert advance(job, seen(open_seats=job.members), network, RULES, at(1)).job is job
    reason = waiting_for(job, seen(open_seats=job.members), network, RULES, 1001.0)
    assert reason == "aggregator agg: it is gone, and the job's versions are there"


def test_a_regional_round_does_not_begin_before_it_is_known_who_is_where():
    job = new_job(placement={"workers": 1}, aggregation={"topology": "regional"})
    job = replace(job, seats=(NodeName("a"),), round=1)
    somewhere = replace(world(), workers={NodeName("a"): worker("a", region="")})
    assert advance(job, seen(), replace(world(), workers=somewhere.workers), RULES, at(1)).job is job


def test_what_another_worker_reported_is_not_counted_for_a_seat():
    job = collecting("a", "b")
    observed = accepted(job, 0, 1)
    forged = {**observed.trained, SeatIndex(0): trained("evil", train_loss=-1e9)}
    sealed = advance(job, replace(observed, trained=forged), world("a", "b"), RULES, at(2)).job
    assert sealed.sealed[0].trained is None
    assert sealed.sealed[1].trained is not None


def test_a_slice_nobody_asked_for_is_none_of_the_test_set():
    job = advance(_sealed(), seen(aggregated=AGGREGATED), world("a", "b"), RULES, at(3)).job
    asked = scores(90, 70)
    more = {0: asked[0], 2: SliceScore(1000, 0.0, 1000)}
    assert advance(job, seen(scores=more), world("a", "b"), RULES, at(4)).job is job
    ended = advance(job, seen(scores={**asked, **more}), world("a", "b"), RULES, at(5)).job
    assert ended.history[0].metrics["test_accuracy"] == pytest.approx(0.8)


def test_a_mean_that_is_no_number_is_left_out():
    told = replace(update(0, "a"), trained=trained("a", examples=1000, train_loss=1e308, train_accuracy=0.5))
    assert reports.train_metrics(replace(collecting("a"), sealed=(told,))) == {"train_accuracy": 0.5}


def test_a_loss_that_is_no_number_is_left_out():
    assert reports.test_metrics({0: SliceScore(10, float("nan"), 5)}) == {"test_accuracy": 0.5}
