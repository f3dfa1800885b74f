"""Who has to do what."""

from __future__ import annotations

from dataclasses import replace

from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain.assignments import Work, assignments, rests
from services.coordinator.domain.explain import waiting_for
from services.coordinator.domain.job import Stage
from services.coordinator.domain.seen import Activity, Failure
from tests.unit.coordinator.jobs import (
    DIGITS,
    RULES,
    accepted,
    collecting,
    new_job,
    scores,
    seen,
    update,
    worker,
    world,
)


def given(job, observed, network, now_s=1000.0):
    return {name: order for name, order in assignments(job, observed, network, RULES, now_s).items()}


def test_nobody_trains_before_the_aggregator_has_opened_the_round():
    job = collecting("a", "b")
    assert {order.work for order in given(job, seen(), world("a", "b")).values()} == {Work.HOLD}
    opened = given(job, seen(open_seats=job.members), world("a", "b"))
    assert {order.work for order in opened.values()} == {Work.TRAIN}


def test_a_substitute_waits_until_the_aggregator_knows_it():
    job = collecting("a", "b")
    before = seen(open_seats=job.members)
    job = replace(job, seats=(NodeName("a"), NodeName("c")))
    orders = given(job, before, world("a", "c"))
    assert (orders["a"].work, orders["c"].work) == (Work.TRAIN, Work.HOLD)


def test_the_same_work_has_the_same_id_and_a_retry_another():
    job = collecting("a", "b")
    observed = seen(open_seats=job.members)
    first = given(job, observed, world("a", "b"))["a"]
    assert given(job, observed, world("a", "b"))["a"].id == first.id
    failed = replace(observed, failures={SeatIndex(0): (Failure(NodeName("a"), "x", is_permanent=False),)})
    assert given(job, failed, world("a", "b"))["a"].id != first.id


def test_only_the_first_seat_makes_the_first_version():
    job = replace(collecting("a", "b"), round=0, cohort=(SeatIndex(0),))
    orders = given(job, seen(open_seats=job.members), world("a", "b"))
    assert (orders["a"].work, orders["b"].work) == (Work.INITIALISE, Work.HOLD)


def test_each_seat_tests_its_own_slice():
    job = replace(collecting("a", "b", "c"), stage=Stage.TESTING)
    orders = given(job, seen(), world("a", "b", "c"))
    assert {name: order.slices for name, order in orders.items()} == {"a": (0,), "b": (1,), "c": (2,)}


def test_slices_of_a_lost_worker_go_to_a_live_one_and_done_ones_to_nobody():
    job = replace(collecting("a", "b", "c"), stage=Stage.TESTING)
    orders = given(job, seen(scores={0: scores(1)[0]}), world("a", "b", "c", b=900.0))
    assert set(orders) == {"a", "c"}
    assert sorted(index for order in orders.values() for index in order.slices) == [1, 2]


def _training_only(network, *names):
    only = {NodeName(name): worker(name, datasets={"digits": DIGITS["digits"]}) for name in names}
    return replace(network, workers={**network.workers, **only})


def test_slices_go_only_to_those_who_have_the_test_data():
    job = replace(collecting("a", "b", "c"), stage=Stage.TESTING)
    orders = given(job, seen(), _training_only(world("a", "b", "c"), "a"))
    assert {name: (order.work, order.slices) for name, order in orders.items()} == {
        "a": (Work.HOLD, ()),
        "b": (Work.EVALUATE, (0, 1)),
        "c": (Work.EVALUATE, (2,)),
    }


def test_when_nobody_can_evaluate_the_status_says_so():
    job = replace(collecting("a", "b"), stage=Stage.TESTING)
    network = _training_only(world("a", "b", b=900.0), "a")
    assert {name: order.work for name, order in given(job, seen(), network).items()} == {"a": Work.HOLD}
    assert waiting_for(job, seen(), network, RULES, 1000.0) == (
        "evaluation: 0 of 2 slices of digits-test done: none of the 2 with a seat is here and has dataset digits-test "
        "(data.test)"
    )
    fresh = waiting_for(new_job(), seen(), _training_only(world(), "a", "b", "c"), RULES, 1000.0)
    assert fresh == ("workers: 3 of 3 ready; none of 3 workers has dataset digits-test to evaluate with (data.test)")


def test_whoever_is_not_known_yet_is_asked_to_evaluate_a_few_times_while_nobody_else_is_there():
    job = replace(collecting("a", "b"), stage=Stage.TESTING)
    unknown = {NodeName("a"): worker("a", datasets={}, is_known=False)}
    network = replace(world(), workers=unknown)
    assert given(job, seen(), network)["a"].slices == (0, 1)
    failed = tuple(Failure(NodeName("a"), "has none", is_permanent=False) for _ in range(RULES.tries))
    assert given(job, seen(failures={SeatIndex(0): failed}), network)["a"].work is Work.HOLD
    known = replace(network, workers={**unknown, NodeName("b"): worker("b")})
    assert {name: order.slices for name, order in given(job, seen(), known).items()} == {"a": (), "b": (0, 1)}


def test_an_ended_job_asks_nothing_of_anybody():
    assert given(replace(collecting("a"), stage=Stage.COMPLETED), seen(), world("a")) == {}


def test_the_status_says_who_is_waited_for_and_for_how_long():
    job = collecting("a", "b", aggregation={"quorum": 1.0, "deadline": 30})
    observed = replace(accepted(job, 0), activities={SeatIndex(1): Activity(NodeName("b"), "training", 1004.0)})
    reason = waiting_for(job, observed, world("a", "b"), RULES, 1008.0)
    assert reason == "worker b (training, 4 s); quorum 1/2; deadline in 22 s"


def test_the_status_says_which_workers_are_missing():
    assert waiting_for(new_job(), seen(), world("a"), RULES, 1000.0) == "workers: 1 of 3 ready"


def test_the_status_says_when_the_aggregator_is_away():
    job = collecting("a")
    assert waiting_for(job, seen(trouble="aggregator x cannot be reached"), world("a"), RULES, 1.0) == (
        "aggregator x cannot be reached"
    )


def test_an_ended_job_waits_for_nothing():
    assert waiting_for(replace(collecting("a"), stage=Stage.FAILED), seen(), world("a"), RULES, 1.0) is None


def test_whoever_has_done_its_part_rests_on_its_assignment_until_the_next_and_a_straggler_is_told_to_stop():
    job = replace(collecting("a", "b"), round=3)
    trained = given(job, seen(open_seats=job.members), world("a", "b"))
    sealed = replace(job, stage=Stage.SEALED, sealed=(update(SeatIndex(0), NodeName("a")),))
    hold = given(sealed, seen(), world("a", "b"))
    assert [rests(sealed, NodeName(name), trained[name], hold[name]) for name in ("a", "b")] == [True, False]
    following = replace(collecting("a", "b"), round=4, included={NodeName("a"): 3})
    hold = given(following, seen(), world("a", "b"))
    assert [rests(following, NodeName(name), trained[name], hold[name]) for name in ("a", "b")] == [True, False]
    gathering = replace(following, stage=Stage.GATHERING)
    assert not rests(gathering, NodeName("a"), trained["a"], given(gathering, seen(), world("a", "b"))["a"])
    again = replace(job, attempt=2)
    assert not rests(again, NodeName("a"), trained["a"], given(again, seen(), world("a", "b"))["a"])
