"""Nodes that take nothing of what is sent, or send a byte now and then: cut off in time, at bounded cost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from cortex_common.identity import Role
from cortex_common.network import messages as m
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.telemetry.hardware import Resources
from cortex_common.telemetry.metrics import REGISTRY
from services.gateway.relay import line_of
from services.gateway.websocket.session import MAX_TRANSFERS
from services.gateway.websocket.socket import MAX_FRAGMENTS, MAX_WAITING_BYTES
from tests.integration.websocket.conftest import Gate, Raw, TlsOf, gate_of
from tests.integration.worker.gateways import node_network
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 1.0
FRAME = bytes(64 * 1024)
MIB = 1 << 20
# What the kernel holds for the sockets on the way, at most, whoever reads them.
KERNEL_BYTES = 24 * MIB
RESOURCES = Resources(1, 0.0, 1, 1, 1, 0, 0)
SHA256 = "ab" * 32


class EndlessWeights:
    """An aggregator whose versions have no end."""

    address = ""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.open = 0

    def attach(self, server: grpc.aio.Server) -> None:
        pull = grpc.unary_stream_rpc_method_handler(
            self.pull, request_deserializer=aggregator_pb2.PullModelRequest.FromString
        )
        handlers = grpc.method_handlers_generic_handler("cortex.v1.WeightService", {"PullModel": pull})
        server.add_generic_rpc_handlers((handlers,))

    async def pull(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            while True:
                self.sent_bytes += len(FRAME)
                yield FRAME
        finally:
            self.open -= 1


@asynccontextmanager
async def endless(tls_of: TlsOf, weights: EndlessWeights | None = None) -> AsyncIterator[EndlessWeights]:
    weights = weights or EndlessWeights()
    rpc = RpcSettings("127.0.0.1", 0, tls_of(Role.AGGREGATOR, "aggregator-1"), "cortex", bulk=True, stop_grace_s=0)
    async with serving(rpc, [weights.attach], ["cortex.v1.WeightService"]) as server:
        weights.address = server.address
        yield weights


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def impatient(tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    """A gateway whose minute is a second."""
    folder = tmp_path_factory.mktemp("impatient")
    async with node_network(tls_of, folder) as nodes, gate_of(nodes, node_patience_s=PATIENCE_S) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def weights(tls_of: TlsOf) -> AsyncIterator[EndlessWeights]:
    async with endless(tls_of) as made:
        yield made


def closes(code: int) -> float:
    return REGISTRY.get_sample_value("cortex_gateway_node_closes_total", {"code": str(code)}) or 0.0


def is_held(gate: Gate, connection: ClientConnection) -> bool:
    """Whether the gateway, in this process too, still has its end of a connection."""
    port, peer = int(gate.url.rpartition(":")[2]), connection.local_address[1]
    return any(
        (each.laddr.port, each.raddr.port) == (port, peer)
        for each in psutil.Process().net_connections("tcp")
        if each.raddr and each.status != psutil.CONN_CLOSE
    )


async def beat(raw: Raw) -> None:
    await raw.send(m.Heartbeat(RESOURCES))
    await raw.expect(m.HeartbeatAck)


async def beats_until_closed(other: Raw, code: int, before: float) -> int:
    """How many heartbeats of another node are answered until the gateway has closed somebody."""
    beats = 0
    async with asyncio.timeout(20):
        while closes(code) == before:
            await beat(other)
            beats += 1
    return beats


async def stalled(raw: Raw) -> None:
    """Ask for a version, take a piece of it, then nothing more: the library reads no further than its queue holds."""
    await raw.send(m.ModelPull("job-1", SHA256))
    while not isinstance(await raw.connection.recv(), bytes):
        pass


async def test_a_node_that_takes_nothing_is_cut_off_and_told_why(impatient: Gate, weights: EndlessWeights) -> None:
    await impatient.introduce("slow", weights.address)
    started_s, sent, before = asyncio.get_running_loop().time(), weights.sent_bytes, closes(4408)
    async with (
        impatient.raw("other", attends=False) as other,
        impatient.raw("slow", attends=False, max_queue=1) as raw,
    ):
        await stalled(raw)
        assert await beats_until_closed(other, 4408, before) > 0, "others are served meanwhile"
        assert asyncio.get_running_loop().time() - started_s >= PATIENCE_S
        assert weights.sent_bytes - sent < KERNEL_BYTES + MAX_WAITING_BYTES, "nobody holds more of it for the node"
        await eventually(lambda: weights.open == 0)
        with suppress(ConnectionClosed):
            while True:
                await raw.connection.recv()
        assert await raw.closed() == (4408, f"the node took nothing for {PATIENCE_S:g} s")
        await beat(other)


async def test_a_node_that_never_reads_again_keeps_no_connection(impatient: Gate, weights: EndlessWeights) -> None:
    await impatient.introduce("deaf", weights.address)
    before = closes(4408)
    async with impatient.raw("deaf", attends=False, max_queue=1) as raw:
        await stalled(raw)
        assert is_held(impatient, raw.connection)
        await eventually(lambda: closes(4408) == before + 1)
        await eventually(lambda: not is_held(impatient, raw.connection), 15)
        raw.connection.transport.abort()


async def test_a_node_that_takes_nothing_does_not_keep_the_gateway_from_stopping(
    tls_of: TlsOf, tmp_path: Any, weights: EndlessWeights
) -> None:
    async with node_network(tls_of, tmp_path) as nodes, AsyncExitStack() as gates:
        gate = await gates.enter_async_context(gate_of(nodes))
        await gate.introduce("deaf", weights.address)
        async with gate.raw("deaf", attends=False, max_queue=1) as raw:
            await stalled(raw)
            await until_full(weights)
            async with asyncio.timeout(20):
                await gates.aclose()
            raw.connection.transport.abort()


async def until_full(weights: EndlessWeights) -> None:
    """Return once nothing moves any more."""
    seen = -1
    while seen != weights.sent_bytes:
        seen = weights.sent_bytes
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.3)


async def trickle(connection: ClientConnection) -> None:
    """A frame of a mebibyte, byte by byte: the node's answers to pings become part of it."""
    connection.transport.write(b"\x82\xff" + MIB.to_bytes(8, "big") + bytes(4))
    while connection.close_code is None:
        connection.transport.write(b"x")
        with suppress(TimeoutError):
            await asyncio.wait_for(connection.wait_closed(), 0.02)


async def fragments(connection: ClientConnection) -> None:
    """A message of ever more fragments; pings are answered between them."""

    async def slowly() -> AsyncIterator[bytes]:
        while connection.close_code is None:
            yield b"x"
            with suppress(TimeoutError):
                await asyncio.wait_for(connection.wait_closed(), 0.02)

    with suppress(ConnectionClosed):
        await connection.send(slowly())


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (trickle, f"no answer to a ping for {PATIENCE_S:g} s"),
        (fragments, f"a message was not here {PATIENCE_S:g} s after it began"),
    ],
)
async def test_an_upload_that_trickles_is_cut_off(impatient: Gate, way: Any, reason: str) -> None:
    before = closes(4408)
    async with impatient.raw("other", attends=False) as other, impatient.raw("slow", attends=False) as raw:
        await raw.send(m.WeightsUpdate())
        trickling = asyncio.create_task(way(raw.connection))
        assert await beats_until_closed(other, 4408, before) > 0, "others are served meanwhile"
        assert await raw.closed() == (4408, reason)
        await trickling


async def test_a_node_that_is_quiet_but_answers_pings_stays(impatient: Gate) -> None:
    async with impatient.raw("quiet", attends=False) as raw:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(raw.connection.wait_closed(), 3.5 * PATIENCE_S)
        await beat(raw)


async def test_a_message_in_too_many_fragments_is_refused(gate: Gate) -> None:
    async with gate.raw("n1", attends=False) as raw:
        with suppress(ConnectionClosed):
            await raw.connection.send("x" for _ in range(MAX_FRAGMENTS + 2))
        assert await raw.closed() == (4400, f"a message in more than {MAX_FRAGMENTS} fragments")


async def test_more_transfers_than_a_node_can_need_are_refused(gate: Gate, weights: EndlessWeights) -> None:
    await gate.introduce("greedy", weights.address)
    async with gate.raw("greedy", attends=False, max_queue=1) as raw:
        for _ in range(MAX_TRANSFERS + 1):
            await raw.send(m.ModelPull("job-1", SHA256))
        with suppress(ConnectionClosed):
            while True:
                await raw.connection.recv()
    assert await raw.closed() == (4400, f"more than {MAX_TRANSFERS} transfers under way on this connection")
    await eventually(lambda: weights.open == 0)


@pytest.mark.slow
async def test_answers_to_pings_are_not_kept_for_a_node_that_does_not_read(gate: Gate) -> None:
    ping, sent = b"\x89\xfd" + bytes(4 + 125), 0
    async with gate.raw("pinging", attends=False) as raw:
        connection = raw.connection
        connection.transport.pause_reading()
        with suppress(ConnectionError):
            while not connection.transport.is_closing():
                connection.transport.write(500 * ping)
                sent += 500 * len(ping)
                assert sent < 2 * (KERNEL_BYTES + MAX_WAITING_BYTES)
                await connection.drain()
                await asyncio.sleep(0)
        assert not is_held(gate, connection)


class Hesitant(EndlessWeights):
    """An aggregator whose versions are never through."""

    async def pull(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            yield FRAME
            await asyncio.Event().wait()
        finally:
            self.open -= 1


async def test_a_node_with_more_transfers_than_a_connection_bears_does_not_hold_the_others_up(
    gate: Gate, tls_of: TlsOf
) -> None:
    """Between gateway and aggregator, that is, where a connection is shared by nodes and has 128 streams."""
    other = next(name for name in map("n{}".format, range(100)) if line_of(name) != line_of("greedy"))
    async with endless(tls_of, Hesitant()) as weights, AsyncExitStack() as opened, asyncio.timeout(60):
        await gate.introduce("greedy", weights.address)
        greedy = await gate.access("greedy", hello=m.Hello("greedy", "eu", "1", 64))
        for _ in range(128 // MAX_TRANSFERS + 1):
            raw = await opened.enter_async_context(gate.raw())
            await raw.join(greedy, attends=False)
            for _ in range(MAX_TRANSFERS):
                await raw.send(m.ModelPull("job-1", SHA256))
        await eventually(lambda: weights.open == 128, 30)
        await gate.introduce(other, weights.address)
        await stalled(await opened.enter_async_context(gate.raw(other, attends=False)))
