"""The two ways of workers to an aggregator, for tests that must hold over both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from cortex_common.network.websocket_link import GatewayAccess
from cortex_common.network.websocket_weights import WeightsChannel
from tests.integration.aggregator.harness import Issue
from tests.integration.websocket.conftest import Gate, gate_of
from tests.integration.worker.gateways import node_network

WORKERS = ("w0", "w1", "w3", "w9")


class ThroughGateway:
    """WebSockets to a gateway, as nodes without a certificate have them."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._accesses: dict[str, GatewayAccess] = {}
        self._aggregator = ""

    async def lead_to(self, aggregator: str) -> None:
        """Have the gateway hear that all workers exchange their weights with this aggregator."""
        if aggregator == self._aggregator:
            return
        self._aggregator = aggregator
        for worker in WORKERS:
            self._accesses[worker] = await self._gate.access(worker)
            await self._gate.introduce(worker, aggregator)

    def channel(self, worker: str) -> grpc.aio.Channel:
        """What transfers of a worker go over."""
        return WeightsChannel(self._accesses[worker]).as_channel()


@asynccontextmanager
async def through_gateway(tls_of: Issue, folder: Path) -> AsyncIterator[ThroughGateway]:
    async with node_network(tls_of, folder) as nodes, gate_of(nodes) as gate:
        yield ThroughGateway(gate)
