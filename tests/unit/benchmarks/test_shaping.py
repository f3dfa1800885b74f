"""A line takes as long for bytes as its rate and its round trip say."""

from __future__ import annotations

import asyncio
import time

from benchmarks.shaping import HOST, shaped

_REPLY = b"x" * 125_000


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(1)
    writer.write(_REPLY)
    await writer.drain()
    writer.close()


async def _ask(address: str) -> float:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    since = time.monotonic()
    writer.write(b"?")
    assert await reader.readexactly(len(_REPLY)) == _REPLY
    writer.close()
    return time.monotonic() - since


async def test_a_megabit_takes_its_time_and_sites_do_not_share_a_line() -> None:
    server = await asyncio.start_server(_answer, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    with shaped(f"{HOST}:{port}", 2, mbit_per_s=5.0, round_trip_s=0.1) as addresses:
        assert len(set(addresses)) == 2
        since = time.monotonic()
        alone = await asyncio.gather(*(_ask(address) for address in addresses))
        together_s = time.monotonic() - since
        shared = await asyncio.gather(*(_ask(addresses[0]) for _ in range(2)))
    server.close()
    assert min(alone) >= 0.2 + 0.1 - 0.02
    assert together_s < 2 * min(alone)
    assert max(shared) >= 0.4 + 0.1 - 0.02
