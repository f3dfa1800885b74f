"""Jobs over bad links: bulk transfers share them with heartbeats and orders, and must leave room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest

from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.rpc.channel import open_channel
from tests.integration.coordinator.harness import Site
from tests.integration.coordinator.test_jobs import job, submit, until
from tests.integration.worker.gateways import files
from tests.integration.worker.harness import working
from tests.links import Link, Modem, over

MBIT = 125_000.0
LEASE_S = 10.0
WORKERS = ("w1", "w2")
SMALL, LARGE = (512, 480), (1024, 1500)
"""Hidden layers of a model of 1.1 MB of float32, and of one of 6.5 MB: 5.2 s at 10 Mbit/s."""


def elements(hidden: tuple[int, int]) -> int:
    """Parameters of the network 64-hidden-10."""
    widths = (64, *hidden, 10)
    return sum((into + 1) * out for into, out in pairwise(widths))


@asynccontextmanager
async def watching(cortex: Site) -> AsyncIterator[dict[str, set[str]]]:
    """All that discovery says of each worker's health, asked beside the slow link."""
    health: dict[str, set[str]] = {}

    async def follow(stub: discovery_pb2_grpc.DiscoveryServiceAsyncStub) -> None:
        async for answer in stub.WatchNodes(discovery_pb2.WatchNodesRequest(role=common_pb2.ROLE_WORKER)):
            for node in answer.nodes:
                health.setdefault(node.name, set()).add(common_pb2.NodeHealth.Name(node.health))

    async with open_channel(cortex.discovery, cortex.tls_of(Role.OPERATOR), Role.DISCOVERY) as channel:
        following = asyncio.create_task(follow(discovery_pb2_grpc.DiscoveryServiceStub(channel)))
        try:
            yield health
            assert not following.done(), "discovery is not followed any more"
        finally:
            following.cancel()


@pytest.mark.parametrize(
    ("link", "hidden", "bandwidth"),
    [
        (Modem(10 * MBIT), LARGE, {}),
        (Modem(10 * MBIT), LARGE, {"up": "5Mbit/s", "down": "5Mbit/s"}),
        (Link(100 * MBIT, delay_s=0.1, loss=0.01), SMALL, {}),
    ],
    ids=["10 Mbit/s, one queue", "10 Mbit/s, one queue, and nodes that limit themselves", "200 ms, 1 % loss"],
)
async def test_a_job_finishes_and_nobody_is_taken_for_lost(tls_of, tmp_path, link, hidden, bandwidth):
    cortex = Site(tls_of, tmp_path)
    cortex.lease_s = LEASE_S
    async with AsyncExitStack() as stack:
        stack.push_async_callback(cortex.close)
        behind = {
            service: await stack.enter_async_context(over(link, lambda at=service: ("127.0.0.1", cortex._ports[at])))
            for service in ("discovery", "aggregator", "coordinator")
        }
        await cortex.start("discovery")
        cortex.advertise = behind["aggregator"]
        await cortex.start("aggregator")
        await cortex.start("coordinator")
        health = await stack.enter_async_context(watching(cortex))
        where = {"coordinator": behind["coordinator"], "discovery": behind["discovery"], "region": "eu"}
        for name in WORKERS:
            own = where | files(tls_of(Role.WORKER, name)) | {"bandwidth": bandwidth}
            await stack.enter_async_context(working(name, tmp_path, **own))
        stub = await stack.enter_async_context(cortex.jobs())
        while set(health) != set(WORKERS):  # noqa: ASYNC110 - placed once discovery has told of them
            await asyncio.sleep(0.05)
        model = {"input_dim": 64, "hidden_dims": list(hidden), "output_dim": 10}
        training = {"rounds": 1, "learning_rate": 0.001}
        job_id = await submit(stub, job(model=model, data={"train": "digits"}, training=training))
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        assert [report.accepted for report in status.history] == [2]
        events = [e.event.name async for e in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))]
    assert not {"seat_given_on", "seat_dropped", "round_retried"} & set(events)
    assert not any("NODE_HEALTH_EXPIRED" in each for each in health.values()), health
    # The first version, and what it and two updates cost both workers: not much more.
    payload = 4 * elements(hidden) * 5
    assert 0.8 * payload < link.passed_bytes < 1.1 * payload
    assert np.isfinite(status.goodput)
    if isinstance(link, Modem):
        # For longer than a lease heartbeats had bulk before them, and at times as much as the queue holds.
        assert link.passed_bytes > 2 * LEASE_S * link.bytes_per_s
        assert link.longest_s * link.bytes_per_s > 0.5 * link.queue_bytes
