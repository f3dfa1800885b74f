"""A worker through whole rounds: real data, real training, real aggregator."""

from __future__ import annotations

import pytest

from cortex_common.pb.v1 import coordinator_pb2
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_worker_initialises_trains_and_evaluates(network: Network) -> None:
    accuracies, downloads = [], []
    for _ in range(3):
        train = await network.next_round(digits_job())
        trained = await network.coordinator.report_on(train, "trained")
        assert trained.trained.receipt.weight == 1438
        assert (trained.trained.steps, trained.trained.examples) == (45, 1438)
        assert 0 < trained.trained.metrics["train_loss"] < 3
        # A version pulled for an evaluation is held for the next training and counts for it, once.
        downloads.append(trained.trained.bytes_down)
        assert trained.trained.bytes_up > 5_000
        network.base = await network.seal(network.round, trained)
        evaluate = await network.hand_out(
            digits_job(), evaluate=coordinator_pb2.EvaluateWork(slice=[0, 1], slices=2), attempt=1
        )
        slices = (await network.coordinator.report_on(evaluate, "evaluated")).evaluated.slices
        assert [each.examples for each in slices] == [179, 180]
        accuracies.append(sum(each.correct for each in slices) / 359)
    assert accuracies[-1] > 0.9
    assert min(downloads) > 5_000
    assert max(downloads) < 1.1 * min(downloads)
    assert accuracies[0] < accuracies[-1]


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_version_reaches_who_holds_its_base_as_a_delta(network: Network, is_restarted: bool) -> None:
    """A worker that left the job and comes back holds nothing, gets all of it, and trains from the same numbers."""
    job = digits_job({"codec": "int8", "download": {"codec": "int8"}})
    downloads = []
    for number in range(3):
        train = await network.next_round(job)
        trained = await network.coordinator.report_on(train, "trained")
        downloads.append(trained.trained.bytes_down)
        network.base = await network.seal(network.round, trained)
        if number == 1 and is_restarted:
            (slot, _) = next(iter(network.main.supervisor._jobs.values()))
            trainer = await slot.trainer()
            await network.coordinator.assign("w1")
            await trainer.ended
    # An exact round at the end: nothing is left out that would come into the rounds of other tests.
    trained = await network.coordinator.report_on(await network.next_round(digits_job()), "trained")
    network.base = await network.seal(network.round, trained)
    whole = 4 * 2_410
    assert downloads[1] < 0.4 * whole
    assert downloads[2] > whole if is_restarted else downloads[2] < 0.4 * whole


async def test_no_local_steps_leave_the_version_as_it_is(network: Network) -> None:
    train = await network.next_round(digits_job(local_steps=0))
    assert await network.seal(network.round, await network.coordinator.report_on(train, "trained")) == network.base


async def test_a_round_tried_again_is_not_trained_again(network: Network, steps_done: StepCount) -> None:
    train = await network.next_round(digits_job())
    first = await network.coordinator.report_on(train, "trained")
    await network.open_round(network.round, ["w1"], network.base, attempt=1)
    train = await network.hand_out(digits_job(), train=coordinator_pb2.TrainWork(), attempt=1)
    second = await network.coordinator.report_on(train, "trained")
    assert (first.trained.receipt.attempt, second.trained.receipt.attempt) == (0, 1)
    assert first.trained.steps == second.trained.steps == steps_done() == 45
    assert first.trained.receipt.content_sha256 != second.trained.receipt.content_sha256, "sealed anew"


async def test_the_same_work_asked_for_again_is_reported_again_not_done_again(
    network: Network, steps_done: StepCount
) -> None:
    train = await network.next_round(digits_job())
    first = await network.coordinator.report_on(train, "trained")
    again = await network.hand_out(digits_job())
    second = await network.coordinator.report_on(again, "trained")
    assert second.trained == first.trained
    assert steps_done() == 45


async def test_the_trainer_goes_with_its_job(network: Network) -> None:
    await network.hand_out(digits_job(), hold=coordinator_pb2.HoldWork())
    supervisor = network.main.supervisor
    (slot, _) = next(iter(supervisor._jobs.values()))
    before = await slot.trainer()
    assert supervisor.free_slots == 0
    await network.coordinator.assign("w1")
    await before.ended
    assert supervisor.free_slots == 1
    assert supervisor.activity == "idle"
    after = await slot.trainer()
    assert after.pid != before.pid
