"""A channel goes on with a renewed certificate: no call is dropped, no stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex_common.errors import InvalidArgumentError, UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import RenewingSyncChannel, open_channel
from cortex_common.rpc.denial import Denial, DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.following import follow
from cortex_common.rpc.renewing import RenewingChannel
from cortex_common.security.authority import Authority
from tests.integration.platform.conftest import Served, ServeExample
from tests.integration.platform.test_mutual_tls import heartbeat
from tests.waiting import eventually

GATEWAY = Identity("cortex", Role.GATEWAY, NodeName("g1"))
TlsOf = Callable[[Role, str], TlsFiles]


@pytest.fixture
def tls(authority: Authority, tmp_path: Path) -> TlsFiles:
    return authority.issue(GATEWAY, [], tmp_path / "g1")


def renewed(authority: Authority, tls: TlsFiles, channel: RenewingChannel) -> None:
    authority.issue(GATEWAY, [], tls.key.parent)
    channel.refresh()


async def test_calls_after_a_renewal_go_over_a_new_connection(
    served: Served, authority: Authority, tls: TlsFiles
) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        for expected in range(4):
            assert channel.serial == expected
            await stub.Heartbeat(discovery_pb2.HeartbeatRequest())
            renewed(authority, tls, channel)
        assert not channel._draining


async def test_a_call_in_progress_ends_on_the_connection_it_began_on(
    served: Served, authority: Authority, tls: TlsFiles
) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        stream = stub.WatchNodes(discovery_pb2.WatchNodesRequest())
        await stream.read()
        renewed(authority, tls, channel)
        await heartbeat(channel)
        assert len(channel._draining) == 1
        assert served.discovery.watching == 1
        stream.cancel()
        await eventually(lambda: not channel._draining)


async def test_a_followed_stream_moves_over_before_the_old_one_is_given_up(
    served: Served, authority: Authority, tls: TlsFiles
) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        watch = follow(channel, stub.WatchNodes, discovery_pb2.WatchNodesRequest())
        for turn in range(4):
            message = await asyncio.wait_for(anext(watch), 10)
            assert message.nodes[0].name == GATEWAY.uri
            await eventually(lambda: served.discovery.watching == 1 and not channel._draining)
            assert channel.serial == turn
            renewed(authority, tls, channel)
        await asyncio.wait_for(anext(watch), 10)
        await watch.aclose()
        await eventually(lambda: served.discovery.watching == 0)


async def test_a_followed_stream_goes_on_though_the_old_one_broke(
    served: Served, authority: Authority, tls: TlsFiles
) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        watch = follow(channel, stub.WatchNodes, discovery_pb2.WatchNodesRequest(refresh_s=1))
        await anext(watch)
        renewed(authority, tls, channel)
        # By now the server has ended the old stream with an error; the new one speaks once before it does so too.
        await anext(watch)
        with pytest.raises(InvalidArgumentError, match="refresh_s: 1"), calling("discovery"):
            await anext(watch)


async def test_a_followed_stream_raises_the_servers_error(served: Served, tls: TlsFiles) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        watch = follow(channel, stub.WatchNodes, discovery_pb2.WatchNodesRequest(refresh_s=1))
        await anext(watch)
        with pytest.raises(Exception, match="refresh_s: 1"), calling("discovery"):
            await anext(watch)


async def test_cancelling_who_follows_ends_the_stream(served: Served, tls: TlsFiles) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        seen = asyncio.Event()

        async def read() -> None:
            async for _ in follow(channel, stub.WatchNodes, discovery_pb2.WatchNodesRequest()):
                seen.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(seen.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: served.discovery.watching == 0)


async def test_files_that_do_not_fit_together_leave_the_connection_as_it_is(
    served: Served, authority: Authority, tls: TlsFiles, tmp_path: Path
) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        other = authority.issue(GATEWAY, [], tmp_path / "other")
        other.key.replace(tls.key)
        channel.refresh()
        assert channel.serial == 0
        await heartbeat(channel)
        other.certificate.replace(tls.certificate)
        channel.refresh()
        assert channel.serial == 1
        await heartbeat(channel)


async def test_the_files_are_looked_at_by_themselves(served: Served, authority: Authority, tls: TlsFiles) -> None:
    async with open_channel(served.address, tls, Role.DISCOVERY) as channel:
        authority.issue(GATEWAY, [], tls.key.parent)
        await eventually(lambda: channel.serial == 1)


async def test_a_program_without_event_loop_takes_the_renewed_certificate(
    served: Served, authority: Authority, tls: TlsFiles
) -> None:
    line = RenewingSyncChannel(served.address, tls, Role.DISCOVERY)

    def call() -> None:
        discovery_pb2_grpc.DiscoveryServiceStub(line.current()).Heartbeat(discovery_pb2.HeartbeatRequest(), timeout=10)

    before = line.current()
    await asyncio.to_thread(call)
    authority.issue(GATEWAY, [], tls.key.parent)
    await asyncio.to_thread(call)
    assert line.current() is not before
    line.close()


async def test_who_is_shut_out_is_refused_and_cut_off(serve_example: ServeExample, tls: TlsFiles) -> None:
    denied = DenyList()
    async with serve_example(denied=denied) as served, open_channel(served.address, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        stream = stub.WatchNodes(discovery_pb2.WatchNodesRequest())
        await stream.read()
        denied.replace([Denial(Identity("cortex", Role.GATEWAY, NodeName("g2")), reason="another")])
        await heartbeat(channel)
        denied.replace([Denial(GATEWAY, reason="lost")])
        with pytest.raises(UnauthenticatedError, match=r"g1 was revoked \(lost\)"), calling("discovery"):
            await asyncio.wait_for(stream.read(), 5)
        await eventually(lambda: served.discovery.watching == 0)
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await heartbeat(channel)
        denied.replace([Denial(GATEWAY, serials=frozenset({1}))])
        await heartbeat(channel)
