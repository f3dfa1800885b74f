"""The network of the worker's tests: one for each file, with one worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from cortex_common.telemetry.metrics import REGISTRY
from tests.integration.worker.harness import Network, TlsOf, network_of


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["grpc", "websocket"])
async def network(
    request: pytest.FixtureRequest, tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Network]:
    """Whatever a worker does, it does over both transports."""
    async with network_of(tls_of, tmp_path_factory.mktemp("network"), request.param) as made:
        made.main = await made.worker("w1")
        yield made


@pytest.fixture(autouse=True)
def own_reports(network: Network) -> None:
    """Each test reads its own reports only."""
    network.coordinator.reports.clear()
    network.coordinator.unwanted.clear()


@pytest.fixture
def steps_done() -> StepCount:
    return StepCount()


class StepCount:
    """Optimiser steps done in this test so far."""

    def __init__(self) -> None:
        self._start = self._read()

    def __call__(self) -> float:
        return self._read() - self._start

    def _read(self) -> float:
        return REGISTRY.get_sample_value("cortex_worker_training_steps_total") or 0.0
