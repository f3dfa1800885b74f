"""What a worker does when something breaks: its trainer, the job's settings, the line to the coordinator."""

from __future__ import annotations

import os
import signal

import pytest

from cortex_common.ids import JobId
from cortex_common.pb.v1 import coordinator_pb2
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, coordinating, digits_job, working

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRAIN = coordinator_pb2.TrainWork()


async def trainer_pid(network: Network) -> int:
    slot, _ = network.main.supervisor._jobs[JobId(network.job_id)]
    return (await slot.trainer()).pid


async def training_forever(network: Network) -> coordinator_pb2.Assignment:
    """Have the worker train until it is stopped; returns once it trains."""
    spec = digits_job(local_seconds=3600.0)
    base = await network.first_version(spec)
    await network.open_round(1, ["w1"], base)
    train = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", train)
    await network.coordinator.until(
        lambda it: any(
            each.activity.metrics.get("steps_per_s") for each in it.reports if each.assignment_id == train.assignment_id
        )
    )
    return train


async def test_a_killed_trainer_is_reported_and_the_same_work_then_gives_the_same_model(network: Network) -> None:
    spec = digits_job()
    base = await network.first_version(spec)
    await network.open_round(1, ["w1"], base)
    endless = network.assignment(digits_job(local_seconds=3600.0), 1, base, train=TRAIN)
    await network.coordinator.assign("w1", endless)
    await network.coordinator.until(lambda it: "training" in it.activities())
    os.kill(await trainer_pid(network), signal.SIGKILL)
    failed = (await network.coordinator.report_on(endless, "failed")).failed
    assert "ended by signal 9 (SIGKILL)" in failed.reason
    assert not failed.permanent
    again = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", again)
    recovered = await network.seal(1, await network.coordinator.report_on(again, "trained"))
    network.job_id += "-undisturbed"
    assert await network.first_version(spec) == base
    await network.open_round(1, ["w1"], base)
    undisturbed = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", undisturbed)
    assert await network.seal(1, await network.coordinator.report_on(undisturbed, "trained")) == recovered


@pytest.mark.parametrize(
    ("changes", "named", "permanent"),
    [
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "training diverged", True),
        ({"optimizer_options": {"momentum": 0.9}}, "adam allows", True),
        ({"device": "cuda:77"}, "this node has", False),
    ],
)
async def test_settings_that_cannot_work_are_reported_with_their_reason(
    network: Network, changes: dict[str, object], named: str, permanent: bool
) -> None:
    base = await network.first_version(digits_job())
    await network.open_round(1, ["w1"], base)
    train = network.assignment(digits_job(**changes), 1, base, train=TRAIN)
    await network.coordinator.assign("w1", train)
    failed = (await network.coordinator.report_on(train, "failed")).failed
    assert named in failed.reason
    assert failed.permanent == permanent


async def test_work_that_is_no_longer_listed_is_dropped_at_once(network: Network, steps_done: StepCount) -> None:
    await training_forever(network)
    pid = await trainer_pid(network)
    base = network.coordinator.wanted["w1"][0].base.sha256
    evaluate = network.assignment(digits_job(), 1, base, evaluate=coordinator_pb2.EvaluateWork(slice=[0], slices=1))
    await network.coordinator.assign("w1", evaluate)
    await network.coordinator.report_on(evaluate, "evaluated")
    assert await trainer_pid(network) == pid, "dropping work needs no new trainer"
    assert steps_done() == 0


async def test_work_the_coordinator_no_longer_wants_is_dropped(network: Network) -> None:
    train = await training_forever(network)
    network.coordinator.unwanted.add(train.assignment_id)
    worker = network.main
    await network.coordinator.until(lambda it: it.count("activity") >= 2)
    _, runner = worker.supervisor._jobs[JobId(network.job_id)]
    while runner._wanted:
        await runner._changed.wait()
    assert network.coordinator.count("failed") == 0


async def test_the_same_work_asked_for_again_is_reported_again_not_done_again(
    network: Network, steps_done: StepCount
) -> None:
    spec = digits_job()
    base = await network.first_version(spec)
    await network.open_round(1, ["w1"], base)
    train = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", train)
    first = await network.coordinator.report_on(train, "trained")
    again = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", again)
    second = await network.coordinator.report_on(again, "trained")
    assert second.trained == first.trained
    assert steps_done() == 45


async def test_a_job_without_a_place_is_refused_and_the_other_goes_on(network: Network) -> None:
    mine = await training_forever(network)
    network.job_id += "-2"
    other = network.assignment(digits_job(), 1, "ab" * 32, train=TRAIN)
    await network.coordinator.assign("w1", mine, other)
    failed = (await network.coordinator.report_on(other, "failed")).failed
    assert "no free slot on this worker (1 of 1" in failed.reason
    assert not failed.permanent
    assert "training" in network.main.supervisor.activity


async def test_an_assignment_that_makes_no_sense_is_refused(network: Network) -> None:
    wrong = network.assignment(digits_job(), 1, "ab" * 32)
    await network.coordinator.assign("w1", wrong)
    failed = (await network.coordinator.report_on(wrong, "failed")).failed
    assert "no work that this worker knows" in failed.reason
    assert failed.permanent


async def test_a_coordinator_that_comes_back_finds_the_training_going_on(
    network: Network, steps_done: StepCount
) -> None:
    """Its own coordinator dies in the middle of a round and comes back at the same address."""
    spec, coordinator = digits_job(local_seconds=4.0), network.coordinator
    base = await network.first_version(spec)
    await coordinator.assign("w1")
    await network.open_round(1, ["w9"], base)
    train = network.assignment(spec, 1, base, train=TRAIN)
    async with coordinating(coordinator, network.tls_of) as address:
        attended = coordinator.attended
        port = int(address.rpartition(":")[2])
        lonely = await network.stack.enter_async_context(working("w9", address, network.tls_of, network.folder))
        await coordinator.assign("w9", train)
        await coordinator.until(lambda it: "training" in it.activities())
    assert steps_done() == 0
    assert "training" in lonely.supervisor.activity
    async with coordinating(coordinator, network.tls_of, port):
        await coordinator.until(lambda it: it.attended >= attended + 2)
        report = await coordinator.report_on(train, "trained")
        assert report.trained.steps == steps_done() > 0
        assert report.trained.train_seconds < 6
        await coordinator.assign("w9")
