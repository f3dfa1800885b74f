"""The line to the coordinator and to the aggregator breaks and comes back."""

from __future__ import annotations

import pytest

from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, ScriptedCoordinator, coordinating, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_coordinator_that_comes_back_finds_the_training_going_on(
    network: Network, steps_done: StepCount
) -> None:
    """A coordinator of its own dies in the middle of a round and comes back, without memory, at the same address."""
    base = await network.first_version(digits_job())
    await network.open_round(1, ["w2"], base)
    spec = digits_job(local_seconds=3.0)
    train = network.assignment(spec, 1, base, train={})
    coordinator = ScriptedCoordinator()
    async with coordinating(coordinator, network.tls_of) as address:
        worker = await network.worker("w2", address)
        await coordinator.assign("w2", train)
        await coordinator.until(lambda it: "training" in it.activities())
    assert steps_done() == 0
    assert "training" in worker.supervisor.activity
    again = ScriptedCoordinator()
    await again.assign("w2", train)
    async with coordinating(again, network.tls_of, int(address.rpartition(":")[2])):
        report = await again.report_on(train, "trained")
        assert report.trained.steps == steps_done() > 0
        assert report.trained.train_seconds < 4
        assert again.attended == 1
