"""A worker through whole rounds: real data, real training, real aggregator."""

from __future__ import annotations

import pytest

from cortex_common.pb.v1 import coordinator_pb2
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")
TRAIN = coordinator_pb2.TrainWork()


async def test_a_worker_initialises_trains_and_evaluates(network: Network) -> None:
    spec = digits_job()
    base = await network.first_version(spec)
    accuracies = []
    for number in (1, 2, 3):
        await network.open_round(number, ["w1"], base)
        train = network.assignment(spec, number, base, train=TRAIN)
        await network.coordinator.assign("w1", train)
        trained = await network.coordinator.report_on(train, "trained")
        assert trained.trained.receipt.weight == 1438
        assert (trained.trained.steps, trained.trained.examples) == (45, 1438)
        assert 0 < trained.trained.metrics["train_loss"] < 3
        # What was pulled for the evaluation is held for the next training.
        assert (trained.trained.bytes_down > 0) == (number == 1)
        assert trained.trained.bytes_up > 9_000
        base = await network.seal(number, trained)
        evaluate = network.assignment(
            spec, number + 1, base, evaluate=coordinator_pb2.EvaluateWork(slice=[0, 1], slices=2)
        )
        await network.coordinator.assign("w1", evaluate)
        slices = (await network.coordinator.report_on(evaluate, "evaluated")).evaluated.slices
        assert [each.examples for each in slices] == [179, 180]
        accuracies.append(sum(each.correct for each in slices) / 359)
    assert accuracies[-1] > 0.9 and accuracies[0] < accuracies[-1]
    assert {"training", "uploading", "evaluating"} & set(network.coordinator.activities())


async def test_no_local_steps_leave_the_version_as_it_is(network: Network) -> None:
    spec = digits_job(local_steps=0)
    base = await network.first_version(spec)
    await network.open_round(1, ["w1"], base)
    train = network.assignment(spec, 1, base, train=TRAIN)
    await network.coordinator.assign("w1", train)
    assert await network.seal(1, await network.coordinator.report_on(train, "trained")) == base


async def test_a_round_tried_again_is_not_trained_again(network: Network, steps_done: StepCount) -> None:
    spec = digits_job()
    base = await network.first_version(spec)
    digests = []
    for attempt in (0, 1):
        await network.open_round(1, ["w1"], base, attempt)
        train = network.assignment(spec, 1, base, train=TRAIN, attempt=attempt)
        await network.coordinator.assign("w1", train)
        trained = await network.coordinator.report_on(train, "trained")
        assert trained.trained.receipt.attempt == attempt
        assert trained.trained.steps == 45
        digests.append(trained.trained.receipt.content_sha256)
    assert steps_done() == 45
    assert digests[0] != digests[1], "another attempt is another object under another key"


async def test_the_trainer_goes_with_its_job(network: Network) -> None:
    worker = network.main
    base = await network.first_version(digits_job())
    hold = network.assignment(digits_job(), 1, base, hold=coordinator_pb2.HoldWork())
    await network.coordinator.assign("w1", hold)
    (slot, _) = next(iter(worker.supervisor._jobs.values()))
    before = await slot.trainer()
    assert worker.supervisor.free_slots == 0
    await network.coordinator.assign("w1")
    await before.ended
    assert worker.supervisor.free_slots == 1
    assert worker.supervisor.activity == "idle"
    after = await slot.trainer()
    assert after.pid != before.pid
