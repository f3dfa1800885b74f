"""A node announces itself to discovery, whatever happens there."""

# ruff: noqa: N802
from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from cortex_common.errors import ForbiddenError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network.heartbeat import NodeReport, heartbeat_forever, node_to_proto
from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.telemetry.resources import Resources
from tests.fakes import ManualClock

TlsOf = Callable[[Role, str], TlsFiles]


@dataclass(frozen=True)
class ExampleDataset:
    name: str = "digits"
    input_shape: tuple[int, ...] = (8, 8)
    classes: int = 10
    examples: int = 1438


REPORT = NodeReport(
    name=NodeName("w1"),
    role=Role.WORKER,
    region="eu",
    address="",
    incarnation="i1",
    version="1",
    resources=Resources(2, 0.5, 10, 5, 100, 1, 2, slots=1),
    started_s=1_700_000_000.25,
    datasets=(ExampleDataset(),),
)


class RecordingDiscovery(discovery_pb2_grpc.DiscoveryServiceServicer):
    """Remembers who spoke."""

    def __init__(self) -> None:
        self.beats: asyncio.Queue[Any] = asyncio.Queue()
        self.leaves: list[Any] = []
        self.refuse = False

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        self.beats.put_nowait(request.node)
        if self.refuse:
            raise ForbiddenError("name is taken")
        return discovery_pb2.HeartbeatResponse(lease_s=10, heartbeat_s=3)

    async def Leave(self, request: Any, context: Any) -> Any:
        self.leaves.append(request)
        return discovery_pb2.LeaveResponse()

    async def ListNodes(self, request: Any, context: Any) -> Any:
        return discovery_pb2.ListNodesResponse()

    async def WatchNodes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield discovery_pb2.WatchNodesResponse()


class Beating:
    """A node that beats, and the discovery it beats at."""

    def __init__(self, tls_of: TlsOf, clock: ManualClock) -> None:
        self.discovery = RecordingDiscovery()
        self.clock = clock
        self.stop = asyncio.Event()
        self.channels = 0
        self._tls_of = tls_of
        self._port = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        settings = RpcSettings("127.0.0.1", self._port, self._tls_of(Role.DISCOVERY, "d1"), "cortex", stop_grace_s=0.0)
        attach = [lambda server: discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(self.discovery, server)]
        async with serving(settings, attach, ["cortex.v1.DiscoveryService"]) as running:
            self._port = running.port
            yield

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(heartbeat_forever(self._channel, lambda: REPORT, self.clock, self.stop, seed=1))

    async def pause(self, seconds: float) -> None:
        """Let the node's wait pass, once it waits."""
        await self.clock.until_sleeping()
        await self.clock.advance(seconds)

    def _channel(self) -> grpc.aio.Channel:
        self.channels += 1
        return open_channel(f"127.0.0.1:{self._port}", self._tls_of(Role.WORKER, "w1"), Role.DISCOVERY)


@pytest.fixture
def beating(tls_of: TlsOf, clock: ManualClock) -> Beating:
    return Beating(tls_of, clock)


async def test_a_node_beats_as_often_as_asked_and_leaves_when_stopped(beating: Beating) -> None:
    async with asyncio.timeout(10), beating.serving():
        task = beating.start()
        first = await beating.discovery.beats.get()
        assert first == node_to_proto(REPORT)
        for _ in range(3):
            await beating.clock.until_sleeping()
            await beating.clock.advance(2.6)
            assert beating.discovery.beats.empty()
            await beating.clock.advance(0.8)
            await beating.discovery.beats.get()
        beating.stop.set()
        await task
        assert [(leave.name, leave.incarnation) for leave in beating.discovery.leaves] == [("w1", "i1")]
        assert beating.channels == 1


async def test_a_node_outlives_discovery_and_finds_it_again(beating: Beating) -> None:
    async with asyncio.timeout(10):
        async with beating.serving():
            task = beating.start()
            await beating.discovery.beats.get()
        for _ in range(4):
            await beating.pause(4)
        assert beating.discovery.beats.empty()
        async with beating.serving():
            await beating.pause(4)
            assert (await beating.discovery.beats.get()).name == "w1"
            beating.stop.set()
            await task


async def test_a_node_that_is_refused_goes_on_with_a_new_connection(beating: Beating) -> None:
    async with asyncio.timeout(10), beating.serving():
        beating.discovery.refuse = True
        task = beating.start()
        for _ in range(3):
            await beating.discovery.beats.get()
            await beating.pause(4)
        beating.discovery.refuse = False
        await beating.discovery.beats.get()
        beating.stop.set()
        await task
        assert beating.channels >= 3


async def test_a_machine_that_cannot_be_looked_at_for_a_while_ends_nothing(beating: Beating) -> None:
    """As when somebody's connections have taken every descriptor of the process."""
    troubles = [OSError(errno.EMFILE, "Too many open files") for _ in range(3)]

    def node() -> NodeReport:
        if troubles:
            raise troubles.pop()
        return REPORT

    async with asyncio.timeout(30), beating.serving():
        task = asyncio.create_task(heartbeat_forever(beating._channel, node, beating.clock, beating.stop, seed=1))
        for _ in range(3):
            await beating.pause(4)
        assert (await beating.discovery.beats.get()).name == "w1"
        beating.stop.set()
        await task


async def test_a_node_stops_though_discovery_never_was_there(beating: Beating) -> None:
    beating._port = 1
    task = beating.start()
    async with asyncio.timeout(10):
        await beating.clock.until_sleeping()
        beating.stop.set()
        await task


def test_a_report_names_role_datasets_and_start() -> None:
    node = node_to_proto(REPORT)
    assert node.role == common_pb2.ROLE_WORKER
    assert [(each.name, list(each.input_shape), each.examples) for each in node.datasets] == [("digits", [8, 8], 1438)]
    assert node.started_at.ToNanoseconds() == 1_700_000_000_250_000_000
