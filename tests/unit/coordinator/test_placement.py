"""Who may work for a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.ids import NodeName
from cortex_common.job.parse import parse_job
from services.coordinator.domain.placement import admission, choose_aggregator, fill_seats, misfit, spares
from services.coordinator.domain.seen import AggregatorView, Dataset, World
from tests.unit.coordinator.jobs import DIGITS, RULES, document, new_job, worker, world


@pytest.mark.parametrize(
    ("placement", "word"),
    [({"regions": ["us"]}, "region"), ({"require_gpu": True}, "GPU"), ({"min_memory": "64GiB"}, "memory")],
)
def test_a_worker_that_does_not_fit_is_told_why(placement, word):
    assert word in (misfit(worker("a"), parse_job(document(placement=placement))) or "")


def test_a_worker_without_the_data_does_not_fit():
    assert "digits" in (misfit(worker("a", datasets={}), parse_job(document())) or "")


TRAIN_ONLY = {"digits": DIGITS["digits"]}


def test_a_worker_without_the_test_data_trains_but_those_that_can_evaluate_come_first():
    assert misfit(worker("a", datasets=TRAIN_ONLY), parse_job(document())) is None
    everybody = world("a", "b", "c", "d")
    workers = {**everybody.workers, NodeName("a"): worker("a", gpus=8, datasets=TRAIN_ONLY)}
    assert fill_seats(new_job(), replace(everybody, workers=workers), RULES, 1000.0) == ("b", "c", "d")
    two = {name: workers[name] for name in map(NodeName, "ab")}
    assert fill_seats(new_job(), replace(everybody, workers=two), RULES, 1000.0) == ("a", "b", None)


def test_the_same_workers_take_the_same_seats_whatever_else_they_do():
    job, idle = new_job(), world("a", "b", "c")
    busy = {**idle.workers, NodeName("a"): worker("a", cpu_utilisation=1.0)}
    assert fill_seats(job, replace(idle, workers=busy), RULES, 1000.0) == ("a", "b", "c")
    more = {**busy, NodeName("d"): worker("d")}
    assert fill_seats(job, replace(idle, workers=more), RULES, 1000.0) == ("b", "c", "d")
    kept = replace(job, seats=(NodeName("c"), None, None))
    assert fill_seats(kept, replace(idle, workers=more), RULES, 1000.0) == ("c", "b", "d")


def test_a_job_that_nobody_can_evaluate_is_refused_with_the_reason():
    workers = {NodeName(name): worker(name, datasets=TRAIN_ONLY) for name in "ab"}
    (violation,) = admission(parse_job(document()), replace(world(), workers=workers), DIGITS)
    assert violation.path == "placement"
    assert violation.message == "none of 2 workers has dataset digits-test to evaluate with (data.test)"
    assert admission(parse_job(document(data={"train": "digits"})), replace(world(), workers=workers), DIGITS) == []


def test_a_job_no_worker_fits_is_refused_with_the_reasons_counted():
    spec = parse_job(document(placement={"workers": 1, "require_gpu": True}))
    (violation,) = admission(spec, world("a", "b"), DIGITS)
    assert violation.path == "placement"
    assert "none of 2 workers" in violation.message
    assert "2 workers: has no GPU" in violation.message


def test_an_empty_network_takes_jobs_and_waits():
    assert admission(parse_job(document()), World({}, {}), DIGITS) == []


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    spec = parse_job(document(data={"train": "digit"}))
    (violation,) = admission(spec, world("a"), DIGITS)
    assert violation.path == "data.train"
    assert "'digit' given" in violation.message
    assert "digits, digits-test" in violation.message


def test_a_wrong_input_size_is_refused_at_submission():
    spec = parse_job(document(model={"input_dim": 784, "output_dim": 5}, data={"train": "digits"}))
    violations = {violation.path: violation.message for violation in admission(spec, world("a"), DIGITS)}
    assert "784 given; inputs of digits have 64 values" in violations["model.input_dim"]
    assert "5 given" in violations["model.output_dim"]


def test_a_dataset_only_one_node_has_is_known():
    spec = parse_job(document(data={"train": "ours"}))
    everybody = world("a", "b")
    ours = {NodeName("b"): worker("b", datasets={"ours": Dataset(64, 10)})}
    assert admission(spec, replace(everybody, workers={**everybody.workers, **ours}), DIGITS) == []


def test_seats_keep_their_workers_and_vacant_ones_are_filled():
    job = replace(new_job(), seats=(NodeName("b"), None, NodeName("gone")), round=1)
    assert fill_seats(job, world("a", "b", "c"), RULES, 1000.0) == ("b", "a", "c")


def test_gpus_come_first_then_idle_processors():
    everybody = world("a", "b", "c")
    workers = {
        **everybody.workers,
        NodeName("b"): worker("b", gpus=1),
        NodeName("a"): worker("a", cpu_utilisation=0.9),
    }
    assert list(spares(new_job(), replace(everybody, workers=workers), frozenset(), RULES, 1000.0)) == ["b", "c", "a"]


def test_the_aggregator_is_in_the_region_with_most_seats():
    us = AggregatorView(NodeName("z-us"), "us", "x:1", is_live=True)
    eu = AggregatorView(NodeName("a-eu"), "eu", "x:2", is_live=True)
    workers = {NodeName(name): worker(name, region="us") for name in ("a", "b")}
    network = World(workers, {us.name: us, eu.name: eu})
    assert choose_aggregator([NodeName("a"), NodeName("b")], network) == us
    gone = replace(network, aggregators={us.name: replace(us, is_live=False), eu.name: eu})
    assert choose_aggregator([NodeName("a")], gone) == eu


def test_workers_discovery_has_not_told_of_yet_refuse_no_job():
    unknown = {NodeName("a"): worker("a", datasets={}, is_known=False)}
    assert admission(parse_job(document()), replace(world(), workers=unknown), DIGITS) == []


def test_regions_are_summed_up_by_an_aggregator_that_has_no_workers_of_its_own():
    us, eu, root = (
        AggregatorView(NodeName(name), region, "x:1", is_live=True)
        for name, region in (("a-us", "us"), ("b-eu", "eu"), ("c-root", "global"))
    )
    workers = {NodeName("a"): worker("a", region="us"), NodeName("b"): worker("b", region="eu")}
    seats = list(workers)
    network = World(workers, {each.name: each for each in (us, eu, root)})
    assert choose_aggregator(seats, network, above_regions=True) == root
    assert choose_aggregator(seats, network) == us
    assert choose_aggregator(seats, World(workers, {us.name: us, eu.name: eu}), above_regions=True) == us
