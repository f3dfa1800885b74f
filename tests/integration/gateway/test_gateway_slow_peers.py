"""Peers that send or take too slowly are given up, and hold up nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from cortex_common.clock import SystemClock
from cortex_common.telemetry.metrics import REGISTRY
from tests.integration.gateway.conftest import Gateway, model_version
from tests.waiting import eventually

HEAD = b"POST /api/v1/jobs/submit HTTP/1.1\r\nHost: x\r\n"
CLOCK = SystemClock()
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
QUICK = {"head_s": 0.4, "body_s": 0.4, "write_s": 0.4}


def given_up(what: str) -> float:
    return REGISTRY.get_sample_value("cortex_gateway_slow_connections_total", {"waited_for": what}) or 0.0


async def connected(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))


async def seconds_until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, drip: bytes = b"") -> float:
    """Send a byte now and then, until the other side has had enough."""
    started_s = time.monotonic()
    async with asyncio.timeout(10):
        while True:
            try:
                if drip:
                    writer.write(drip)
                    await writer.drain()
                if not await asyncio.wait_for(reader.read(1000), 0.05):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    writer.close()
    return time.monotonic() - started_s


@pytest.mark.parametrize(
    ("first", "drip", "what"),
    [
        (b"", b"", "head"),
        (HEAD, b"", "head"),
        (HEAD + b"X-Slow: ", b"x", "head"),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b" ", "body"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", "body"),
    ],
    ids=["silence", "half a head", "a head byte by byte", "a body byte by byte", "chunk after chunk"],
)
async def test_who_sends_too_slowly_is_given_up(stopped_gateway: Gateway, first: bytes, drip: bytes, what: str) -> None:
    async with stopped_gateway.running(**QUICK) as gateway:
        before = given_up(what)
        if what == "body":
            first = first.replace(b"\r\n", b"\r\nAuthorization: Bearer " + gateway.token.encode() + b"\r\n", 1)
        streams = [await connected(gateway) for _ in range(20)]
        for _, writer in streams:
            writer.write(first)
        waiting = asyncio.gather(*(seconds_until_closed(*each, drip) for each in streams))
        assert (await gateway.http.get("/api/v1/jobs")).status_code == 200, "others are served meanwhile"
        seconds = await waiting
        assert max(seconds) < 5
        assert given_up(what) == before + 20


async def test_who_takes_no_answer_is_given_up(stopped_gateway: Gateway) -> None:
    # Pieces of a model for as long as somebody takes them: far more than socket buffers hold.
    stopped_gateway.jobs.model = model = bytes(20_000_000)
    stopped_gateway.jobs.version = model_version(data=model)
    async with stopped_gateway.running(**QUICK) as gateway:
        before = given_up("answer")
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        port = int(gateway.url.rpartition(":")[2])
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        head = f"GET /api/v1/jobs/job-1/model HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(raw, head.encode())
        await eventually(lambda: given_up("answer") == before + 1, 10)
        raw.close()


async def test_connections_have_a_limit(stopped_gateway: Gateway) -> None:
    async with stopped_gateway.running(max_connections=10, head_s=5.0) as gateway:
        streams = [await connected(gateway) for _ in range(12)]
        assert (await gateway.http.get("/healthz")).status_code == 503
        for _, writer in streams:
            writer.close()
        async with asyncio.timeout(5):
            while (await gateway.http.get("/healthz")).status_code != 200:
                await CLOCK.sleep(0.05)


async def test_a_head_without_end_is_refused(stopped_gateway: Gateway) -> None:
    async with stopped_gateway.running() as gateway:
        reader, writer = await connected(gateway)
        writer.write(HEAD + b"X-Much: " + b"x" * 100_000)
        async with asyncio.timeout(5):
            assert (await reader.read(12)).startswith(b"HTTP/1.1 400")
        writer.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET /ws HTTP/1.1\r\nHost: x\r\n", UPGRADE], ids=["silence", "half a head", "no JOIN"]
)
async def test_a_node_that_does_not_join_is_given_up(stopped_gateway: Gateway, said: bytes) -> None:
    async with stopped_gateway.running(websocket_port=0, node_join_s=0.4, **QUICK) as gateway:
        port = json.loads((gateway.folder / "ready.json").read_text())["websocket"].rpartition(":")[2]
        streams = [await asyncio.open_connection("127.0.0.1", int(port)) for _ in range(10)]
        for _, writer in streams:
            writer.write(said)
        seconds = await asyncio.gather(*(seconds_until_closed(*each) for each in streams))
        assert max(seconds) < 6
