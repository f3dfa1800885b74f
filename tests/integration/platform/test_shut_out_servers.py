"""No call goes to an aggregator that is shut out, and those that are under way are cut off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from cortex_common.errors import UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.aggregator_channels import AggregatorChannels
from cortex_common.rpc.denial import Denial, DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.following import follow
from cortex_common.transfer.push import _connected
from tests.integration.platform.conftest import Served, ServeExample
from tests.waiting import eventually

TlsOf = Callable[[Role, str], TlsFiles]
GONE = Denial(Identity("cortex", Role.AGGREGATOR, NodeName("a1")), reason="laptop lost")
WHY = r"aggregator a1 was revoked \(laptop lost\): a new join token lets it in again"


@pytest.fixture
async def served(serve_example: ServeExample, tls_of: TlsOf) -> AsyncIterator[Served]:
    async with serve_example(tls=tls_of(Role.AGGREGATOR, "a1")) as running:
        yield running


@asynccontextmanager
async def channels(tls_of: TlsOf, denied: DenyList) -> AsyncIterator[AggregatorChannels]:
    made = AggregatorChannels(tls_of(Role.GATEWAY, "g1"), denied)
    try:
        yield made
    finally:
        await made.close()


async def heartbeat(channel: grpc.aio.Channel) -> None:
    with calling("aggregator"):
        await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(discovery_pb2.HeartbeatRequest())


async def watching(channel: grpc.aio.Channel, begun: asyncio.Event) -> None:
    with calling("aggregator"):
        method = discovery_pb2_grpc.DiscoveryServiceStub(channel).WatchNodes
        async for _ in follow(channel, method, discovery_pb2.WatchNodesRequest()):
            begun.set()


async def test_streams_are_cut_off_and_calls_refused_until_it_is_let_in_again(served: Served, tls_of: TlsOf) -> None:
    denied, begun = DenyList(), asyncio.Event()
    async with channels(tls_of, denied) as made:
        channel = made.to(served.address, "a1")
        stream = asyncio.create_task(watching(channel, begun))
        await asyncio.wait_for(begun.wait(), 30)
        denied.replace([GONE])
        with pytest.raises(UnavailableError, match="aggregator: the call was cut off"):
            await asyncio.wait_for(stream, 30)
        await eventually(lambda: served.discovery.watching == 0, 30)
        assert made.to(served.address, "a1") is channel
        with pytest.raises(UnavailableError, match=WHY):
            await heartbeat(channel)
        # Another has taken over its address, and the connection to it is given up.
        await heartbeat(made.to(served.address, "a2"))
        await eventually(lambda: channel.serial == 1, 30)
        denied.replace([])
        await heartbeat(channel)


async def test_only_old_certificates_are_no_reason(served: Served, tls_of: TlsOf) -> None:
    denied = DenyList()
    denied.replace([Denial(GONE.identity, frozenset({1}))])
    async with channels(tls_of, denied) as made:
        await heartbeat(made.to(served.address, "a1"))
    assert denied.names(Role.AGGREGATOR) == frozenset()


async def test_one_that_is_shut_out_already_is_never_called(served: Served, tls_of: TlsOf) -> None:
    denied = DenyList()
    denied.replace([GONE])
    assert denied.names(Role.AGGREGATOR) == {"a1"}
    assert denied.names(Role.WORKER) == frozenset()
    async with channels(tls_of, denied) as made:
        with pytest.raises(UnavailableError, match=WHY):
            await heartbeat(made.to(served.address, "a1"))


async def test_whoever_cancels_a_call_is_not_told_that_it_was_cut_off(served: Served, tls_of: TlsOf) -> None:
    begun = asyncio.Event()
    async with channels(tls_of, DenyList()) as made:
        stream = asyncio.create_task(watching(made.to(served.address, "a1"), begun))
        await asyncio.wait_for(begun.wait(), 30)
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream


async def test_an_upload_that_is_still_connecting_is_cut_off_too(tls_of: TlsOf) -> None:
    denied = DenyList()

    async def silent(_reader: object, writer: Any) -> None:
        await writer.wait_closed()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, channels(tls_of, denied) as made:
        call = made.to(f"{host}:{port}", "a1").stream_stream("/cortex.v1.WeightService/PushUpdate")()
        waiting = asyncio.create_task(_connected(call))
        await asyncio.sleep(0)
        denied.replace([GONE])
        await asyncio.wait_for(waiting, 30)
        assert await call.code() is grpc.StatusCode.CANCELLED
