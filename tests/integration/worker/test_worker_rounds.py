"""A worker through whole rounds: real data, real training, real aggregator."""

from __future__ import annotations

from cortex_common.pb.v1 import coordinator_pb2
from tests.integration.worker.harness import Network, digits_job

TRAIN = coordinator_pb2.TrainWork()


async def test_a_worker_initialises_trains_and_evaluates(network: Network) -> None:
    spec = digits_job()
    await network.worker("w1")
    base = await network.first_version(spec)
    accuracies = []
    for number in (1, 2, 3):
        await network.open_round(number, ["w1"], base)
        train = network.assignment(spec, number, base, train=TRAIN)
        await network.coordinator.assign("w1", train)
        trained = await network.coordinator.report_on(train, "trained")
        assert trained.trained.receipt.weight == 1438
        assert trained.trained.steps == 45
        base = await network.seal(number, trained)
        evaluate = network.assignment(
            spec, number + 1, base, evaluate=coordinator_pb2.EvaluateWork(slice=[0, 1], slices=2)
        )
        await network.coordinator.assign("w1", evaluate)
        slices = (await network.coordinator.report_on(evaluate, "evaluated")).evaluated.slices
        assert [each.examples for each in slices] == [179, 180]
        accuracies.append(sum(each.correct for each in slices) / 359)
    assert accuracies[-1] > 0.9 and accuracies[0] < accuracies[-1]
    print(accuracies)
