"""What one caller, or somebody who is none, may do to a server: each limit with an attempt to break it."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cortex_common.buckets import Allowance
from cortex_common.clock import SystemClock
from cortex_common.errors import CortexError, ForbiddenError, OverloadedError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc, identity_pb2, identity_pb2_grpc
from cortex_common.rpc.auditing import auditing
from cortex_common.rpc.channel import channel_options, open_channel
from cortex_common.rpc.denial import Denial, DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.fairness import CallerLimits
from cortex_common.rpc.interceptor import CallLimits
from cortex_common.rpc.tls import client_credentials, current_material
from cortex_common.security.audit import read_log
from cortex_common.security.authority import Authority
from tests.fakes import ManualClock
from tests.integration.platform.conftest import Served, ServeExample
from tests.waiting import eventually

TlsOf = Callable[[Role, str], TlsFiles]
CLOCK = SystemClock()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, HEADERS, GOAWAY = 4, 6, 1, 7


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


async def raw(served: Served, tls: TlsFiles | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, with TLS or without, on which nothing has been said."""
    port, secured = served.running.port, None
    if tls is not None:
        secured = ssl.create_default_context(cafile=str(tls.ca))
        secured.load_cert_chain(tls.certificate, tls.key)
        secured.set_alpn_protocols(["h2"])
    name = None if tls is None else Role.DISCOVERY.server_name
    return await asyncio.open_connection("127.0.0.1", port, ssl=secured, server_hostname=name)


async def said_until_closed(reader: asyncio.StreamReader, within_s: float = 8.0) -> bytes:
    """Everything the server says until it closes the connection."""
    said = b""
    async with asyncio.timeout(within_s):
        try:
            while piece := await reader.read(65536):
                said += piece
        except (ConnectionError, ssl.SSLError):
            pass
    return said


async def beat(channel: grpc.aio.Channel, **options: Any) -> None:
    with calling("discovery"):
        await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(discovery_pb2.HeartbeatRequest(), **options)


def watch(channel: grpc.aio.Channel) -> Any:
    return discovery_pb2_grpc.DiscoveryServiceStub(channel).WatchNodes(discovery_pb2.WatchNodesRequest())


def limits(**changes: Any) -> CallLimits:
    return CallLimits(caller=CallerLimits(**changes))


def own_connection(served: Served, tls: TlsFiles) -> grpc.aio.Channel:
    """A channel that shares no connection with another."""
    options = [*channel_options(Role.DISCOVERY), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(served.address, client_credentials(current_material(tls, CLOCK)), options)


# --- people who are none, and slow ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_secured", "said"), [(False, b""), (False, b"\x16\x03\x01"), (True, b""), (True, PREFACE[:10])]
)
async def test_a_handshake_without_end_is_given_up(
    serve_example: ServeExample, tls_of: TlsOf, is_secured: bool, said: bytes
) -> None:
    async with serve_example(handshake_s=0.4) as served:
        reader, writer = await raw(served, tls_of(Role.WORKER, "w1") if is_secured else None)
        writer.write(said)
        started_s = time.monotonic()
        await said_until_closed(reader)
        assert time.monotonic() - started_s < 5
        writer.close()


async def test_a_connection_that_does_nothing_is_given_up(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with serve_example(connection_idle_s=0.4) as served:
        reader, writer = await raw(served, tls_of(Role.WORKER, "w1"))
        # Headers that never end: a call that has not begun keeps nothing open.
        writer.write(PREFACE + frame(SETTINGS) + frame(HEADERS, 0, 1, b"\x82"))
        said = await said_until_closed(reader)
        assert said, "it spoke HTTP/2"
        writer.close()


async def test_a_flood_of_pings_is_given_up(served: Served, tls_of: TlsOf) -> None:
    reader, writer = await raw(served, tls_of(Role.WORKER, "w1"))
    writer.write(PREFACE + frame(SETTINGS) + b"".join(frame(PING, 0, 0, struct.pack(">Q", n)) for n in range(100)))
    said = await said_until_closed(reader)
    assert b"too_many_pings" in said
    writer.close()


async def test_a_caller_that_takes_nothing_is_given_up(serve_example: ServeExample, tls_of: TlsOf) -> None:
    ended = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            ended.set()

    def attach(server: grpc.aio.Server) -> None:
        handlers = {"Endless": grpc.unary_stream_rpc_method_handler(endless)}
        service = "grpc.reflection.v1.ServerReflection"  # open to every role, and not otherwise served
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async with (
        serve_example(extra=[attach], limits=CallLimits(write_s=0.3)) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        stream = channel.unary_stream("/grpc.reflection.v1.ServerReflection/Endless")(b"")
        assert len(await stream.read()) == 1 << 20
        async with asyncio.timeout(8):
            await ended.wait()
        await beat(channel)
        stream.cancel()


# --- callers who want more than their share ---------------------------------------------------------------------------


async def test_a_call_takes_no_longer_than_the_server_allows(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async def never(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    def attach(server: grpc.aio.Server) -> None:
        handlers = {"Never": grpc.unary_unary_rpc_method_handler(never)}
        service = "grpc.reflection.v1.ServerReflection"
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async with (
        serve_example(extra=[attach], limits=CallLimits(unary_s=0.2)) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        for options in ({}, {"timeout": 3600}):
            with pytest.raises(UnavailableError, match=r"the call took more than 0.2 s"), calling("discovery"):
                await channel.unary_unary("/grpc.reflection.v1.ServerReflection/Never")(b"", **options)


def counting(server: grpc.aio.Server) -> None:
    """Serve an upload that is answered with how many messages came."""

    async def count(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d" % len([each async for each in requests])

    handlers = {"Count": grpc.stream_unary_rpc_method_handler(count)}
    service = "grpc.reflection.v1.ServerReflection"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


async def test_an_upload_may_last_as_long_as_something_comes_and_is_given_up_when_nothing_does(
    serve_example: ServeExample, tls_of: TlsOf
) -> None:
    async def pieces(count: int, *, ends: bool) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x"
            await CLOCK.sleep(0.1)
        if not ends:
            await asyncio.Event().wait()

    async with (
        serve_example(extra=[counting], limits=CallLimits(unary_s=0.5)) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        upload = channel.stream_unary("/grpc.reflection.v1.ServerReflection/Count")
        assert await upload(pieces(10, ends=True)) == b"10", "twice as long as one answer may take"
        with (
            pytest.raises(UnavailableError, match=r"the caller sent nothing for more than 0.5 s"),
            calling("discovery"),
        ):
            await upload(pieces(1, ends=False))


@pytest.mark.parametrize(
    ("role", "service", "method"),
    [
        (Role.COORDINATOR, "RoundService", "SealRound"),
        (Role.COORDINATOR, "RoundService", "ForwardRound"),
        (Role.COORDINATOR, "RoundService", "ResealJob"),
        (Role.OPERATOR, "KeyService", "RotateDataKey"),
        (Role.OPERATOR, "KeyService", "RotateKeyEncryptionKey"),
    ],
)
async def test_what_takes_as_long_as_there_are_weights_or_keys_is_waited_for(
    serve_example: ServeExample, tls_of: TlsOf, role: Role, service: str, method: str
) -> None:
    async def slow(request: bytes, context: Any) -> bytes:
        await CLOCK.sleep(0.4)
        return b"done"

    def attach(server: grpc.aio.Server) -> None:
        handlers = {method: grpc.unary_unary_rpc_method_handler(slow)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"cortex.v1.{service}", handlers),))

    async with (
        serve_example(extra=[attach], limits=CallLimits(unary_s=0.1)) as served,
        open_channel(served.address, tls_of(role, "patient"), Role.DISCOVERY) as channel,
    ):
        with calling("discovery"):
            assert await channel.unary_unary(f"/cortex.v1.{service}/{method}")(b"") == b"done"


async def test_one_caller_cannot_take_all_calls(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with (
        serve_example(limits=limits(open_calls=2)) as served,
        open_channel(served.address, tls_of(Role.GATEWAY, "greedy"), Role.DISCOVERY) as greedy,
        open_channel(served.address, tls_of(Role.GATEWAY, "modest"), Role.DISCOVERY) as modest,
    ):
        first, second = watch(greedy), watch(greedy)
        await first.read()
        await second.read()
        with pytest.raises(OverloadedError, match=r"gateway/greedy has 2 calls open; allowed: 2"), calling("d"):
            await watch(greedy).read()
        other = watch(modest)
        await other.read()
        for stream in (first, other):
            stream.cancel()
        await eventually(lambda: served.discovery.watching == 1)
        await watch(greedy).read()


async def test_one_caller_cannot_take_all_connections(serve_example: ServeExample, tls_of: TlsOf) -> None:
    tls = tls_of(Role.GATEWAY, "greedy")
    async with serve_example(limits=limits(connections=2)) as served, AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(own_connection(served, tls)) for _ in range(3)]
        for channel in channels[:2]:
            await watch(channel).read()
        with pytest.raises(OverloadedError, match="has 2 connections; allowed: 2"), calling("discovery"):
            await watch(channels[2]).read()
        await watch(channels[0]).read()


async def test_one_caller_cannot_call_without_end(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with (
        serve_example(limits=limits(calls=Allowance(per_s=0.5, burst=3))) as served,
        open_channel(served.address, tls_of(Role.WORKER, "greedy"), Role.DISCOVERY) as greedy,
        open_channel(served.address, tls_of(Role.WORKER, "modest"), Role.DISCOVERY) as modest,
    ):
        for _ in range(3):
            await beat(greedy)
        with pytest.raises(OverloadedError, match=r"calls too often; allowed: 0.5 a second, 3 at once") as caught:
            await beat(greedy)
        assert caught.value.retry_after_s == 2
        await beat(modest)


async def test_calls_that_are_refused_count_too(serve_example: ServeExample, tls_of: TlsOf, tmp_path: Path) -> None:
    own = tls_of(Role.DISCOVERY, "d1")
    async with (
        auditing(tmp_path, own, CLOCK) as auditor,
        serve_example(limits=limits(calls=Allowance(per_s=0.01, burst=3)), auditor=auditor) as served,
        open_channel(served.address, tls_of(Role.OPERATOR, "greedy"), Role.DISCOVERY) as greedy,
        open_channel(served.address, tls_of(Role.WORKER, "modest"), Role.DISCOVERY) as modest,
    ):
        for _ in range(3):
            with pytest.raises(ForbiddenError, match="operator 'greedy' may not call"):
                await beat(greedy)
        for _ in range(20):
            with pytest.raises(OverloadedError, match=r"operator/greedy calls too often; allowed: 0.01 a second"):
                await beat(greedy)
        await beat(modest)
    (record,) = [each for each in read_log(tmp_path) if each["what"].endswith("/Heartbeat") and not each.get("repeats")]
    assert (record["who"], record["decision"]) == ("spiffe://cortex/operator/greedy", "refused")
    (later,) = [each for each in read_log(tmp_path) if each.get("repeats")]
    assert later["repeats"] == 2, "those that were not let in at all are only counted"


async def test_privileged_calls_that_are_not_let_in_do_not_fill_the_audit_log(
    serve_example: ServeExample, tls_of: TlsOf, tmp_path: Path
) -> None:
    async def rotate(request: bytes, context: Any) -> bytes:
        return b"done"

    def attach(server: grpc.aio.Server) -> None:
        handlers = {"RotateDataKey": grpc.unary_unary_rpc_method_handler(rotate)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cortex.v1.KeyService", handlers),))

    allowed = limits(calls=Allowance(per_s=0.01, burst=3))
    async with (
        auditing(tmp_path, tls_of(Role.DISCOVERY, "d1"), CLOCK) as auditor,
        serve_example(extra=[attach], limits=allowed, auditor=auditor) as served,
        open_channel(served.address, tls_of(Role.OPERATOR, "greedy"), Role.DISCOVERY) as greedy,
    ):
        call = greedy.unary_unary("/cortex.v1.KeyService/RotateDataKey")
        for _ in range(3):
            assert await call(b"") == b"done"
        for _ in range(20):
            with pytest.raises(OverloadedError, match="calls too often"), calling("discovery"):
                await call(b"")
    records = [each for each in read_log(tmp_path) if each["what"].endswith("/RotateDataKey")]
    assert [(each["decision"], each["code"]) for each in records] == [("allowed", "OK")] * 3


@pytest.mark.parametrize(
    ("kind", "why"),
    [("network", "belongs to another network"), ("revoked", "was revoked"), ("expired", "expired at")],
)
async def test_callers_who_are_not_good_any_more_cannot_call_without_end(
    serve_example: ServeExample, authority: Authority, tls_of: TlsOf, tmp_path: Path, kind: str, why: str
) -> None:
    clock, denied = ManualClock(wall_s=time.time()), DenyList()
    network = "other" if kind == "network" else "cortex"
    greedy = Identity(network, Role.WORKER, NodeName("greedy"))
    life = {"life": dt.timedelta(hours=1)} if kind == "expired" else {}
    bad = Authority(network, authority.directory).issue(greedy, [], tmp_path, **life)
    if kind == "revoked":
        denied.replace([Denial(greedy)])
    allowed = limits(outsiders=Allowance(per_s=0.5, burst=3))
    async with (
        serve_example(limits=allowed, clock=clock, denied=denied) as served,
        open_channel(served.address, bad, Role.DISCOVERY) as outsider,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as member,
    ):
        clock.jump_wall(2 * 3600 if kind == "expired" else 0)
        for _ in range(3):
            with pytest.raises(UnauthenticatedError, match=why):
                await beat(outsider)
        for _ in range(20):
            with pytest.raises(OverloadedError, match=r"too many calls come from ipv4:127\.0\.0\.1") as caught:
                await beat(outsider)
        assert caught.value.retry_after_s == 2
        await beat(member)
        await clock.advance(2.5)
        with pytest.raises(UnauthenticatedError, match=why):
            await beat(outsider)


async def test_one_address_without_a_certificate_cannot_call_without_end(
    serve_example: ServeExample, authority: Authority
) -> None:
    class Enrolment(identity_pb2_grpc.EnrollmentServiceServicer):
        async def GetRoots(self, request: Any, context: Any) -> Any:  # noqa: N802
            return identity_pb2.GetRootsResponse()

    def attach(server: grpc.aio.Server) -> None:
        identity_pb2_grpc.add_EnrollmentServiceServicer_to_server(Enrolment(), server)

    allowed = limits(strangers=Allowance(per_s=0.5, burst=3))
    options = channel_options(Role.DISCOVERY)
    credentials = grpc.ssl_channel_credentials(authority.bundle)
    async with (
        serve_example(extra=[attach], limits=allowed, is_mutual=False) as served,
        grpc.aio.secure_channel(served.address, credentials, options) as channel,
    ):
        stub = identity_pb2_grpc.EnrollmentServiceStub(channel)
        for _ in range(3):
            await stub.GetRoots(identity_pb2.GetRootsRequest())
        with (
            pytest.raises(OverloadedError, match=r"too many calls come from ipv4:127\.0\.0\.1") as caught,
            calling("discovery"),
        ):
            await stub.GetRoots(identity_pb2.GetRootsRequest())
        assert caught.value.retry_after_s == 2


async def test_more_streams_than_a_connection_may_have_wait_at_the_caller(
    serve_example: ServeExample, tls_of: TlsOf
) -> None:
    async with (
        serve_example(max_streams=2) as served,
        open_channel(served.address, tls_of(Role.GATEWAY, "g1"), Role.DISCOVERY) as channel,
    ):
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        streams = [watch(channel), watch(channel)]
        for stream in streams:
            await stream.read()
        with pytest.raises(UnavailableError, match="did not answer in time"), calling("discovery"):
            await stub.ListNodes(discovery_pb2.ListNodesRequest(), timeout=0.3)
        streams[0].cancel()
        await stub.ListNodes(discovery_pb2.ListNodesRequest(), timeout=10)


async def test_a_message_that_is_packed_is_not_unpacked(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with (
        serve_example(max_message_bytes=64 * 1024) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        call = channel.unary_unary("/cortex.v1.DiscoveryService/Heartbeat")
        with pytest.raises(CortexError, match=r"ompress"), calling("discovery"):
            await call(bytes(60_000), compression=grpc.Compression.Gzip)
        with pytest.raises(CortexError), calling("discovery"):
            await call(bytes(50_000_000), compression=grpc.Compression.Gzip)


async def test_each_server_takes_messages_as_large_as_its_own_and_no_larger(
    serve_example: ServeExample, tls_of: TlsOf
) -> None:
    from services.coordinator.settings import CoordinatorSettings
    from services.discovery.settings import DiscoverySettings

    assert DiscoverySettings.MAX_MESSAGE_BYTES == 256 * 1024
    assert CoordinatorSettings.MAX_MESSAGE_BYTES < 2 << 20
    async with (
        serve_example(max_message_bytes=DiscoverySettings.MAX_MESSAGE_BYTES) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        call = channel.unary_unary("/cortex.v1.DiscoveryService/Heartbeat")
        with pytest.raises(OverloadedError, match="larger than max"), calling("discovery"):
            await call(bytes(257 * 1024))
