"""`python -m benchmarks.shaping`: a bad link before a server, as a process of its own. Loopback only.

Each port is one site's access line: so many bytes a second and so much delay in each direction, shared by all
connections through it, which take turns. It stands in for the kernel's netem, which many containers' kernels lack.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated

import typer

from benchmarks.network import BenchmarkError, child_environment

HOST = "127.0.0.1"
_SEGMENT_BYTES = 16 * 1024
_SHORTEST_SLEEP_S = 0.001
_STOP_S = 5.0


@dataclass
class Line:
    """One direction of a site's access line."""

    bytes_per_s: float
    delay_s: float
    _free_at: float = field(default=0.0)

    @property
    def segments_under_way(self) -> int:
        """How many a sender may have outstanding: what fits on the line twice, and some for the queue before it."""
        return 8 + int(2 * self.bytes_per_s * self.delay_s / _SEGMENT_BYTES)

    async def carry(self, size: int) -> float:
        """Take a turn; gives when it arrives, on the loop's clock."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + size / self.bytes_per_s
        arrives = self._free_at + self.delay_s
        if self._free_at - now > _SHORTEST_SLEEP_S:
            await asyncio.sleep(self._free_at - now)
        return arrives


async def _serve(target: tuple[str, int], sites: int, bytes_per_s: float, delay_s: float) -> None:
    servers = []
    for _ in range(sites):
        up, down = Line(bytes_per_s, delay_s), Line(bytes_per_s, delay_s)

        async def connect(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: Line = up, down: Line = down
        ) -> None:
            far_reader, far_writer = await asyncio.open_connection(*target, limit=_SEGMENT_BYTES)
            await asyncio.gather(_pump(up, reader, far_writer), _pump(down, far_reader, writer), return_exceptions=True)

        servers.append(await asyncio.start_server(connect, HOST, 0, limit=_SEGMENT_BYTES))
    typer.echo(json.dumps([server.sockets[0].getsockname()[1] for server in servers]))
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def _pump(line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Segments in order; while one is on its way the next already takes its turn."""
    arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(line.segments_under_way)
    deliver = asyncio.create_task(_deliver(arrivals, writer))
    try:
        while segment := await reader.read(_SEGMENT_BYTES):
            await arrivals.put((await line.carry(len(segment)), segment))
        await arrivals.put((0.0, b""))
        await deliver
    finally:
        deliver.cancel()
        writer.close()


async def _deliver(arrivals: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, segment = await arrivals.get()
        if due - loop.time() > _SHORTEST_SLEEP_S:
            await asyncio.sleep(due - loop.time())
        if not segment:
            return
        writer.write(segment)
        await writer.drain()


@contextmanager
def shaped(address: str, sites: int, mbit_per_s: float, round_trip_s: float) -> Iterator[list[str]]:
    """Addresses, one a site, through which a server is reached over a line of its own.

    Raises:
        BenchmarkError: the process does not start.
    """
    command = [sys.executable, "-m", "benchmarks.shaping", address, str(sites), str(mbit_per_s), str(round_trip_s)]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise BenchmarkError("the shaped link does not start")
        yield [f"{HOST}:{port}" for port in json.loads(line)]
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        process.kill()


def main(
    address: Annotated[str, typer.Argument(help="Of the server, host:port.")],
    sites: Annotated[int, typer.Argument(help="How many lines.")],
    mbit_per_s: Annotated[float, typer.Argument(help="Rate of each line and direction.")],
    round_trip_s: Annotated[float, typer.Argument(help="Delay there and back.")],
) -> None:
    """Print the ports as JSON, then serve until terminated."""
    host, _, port = address.rpartition(":")
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve((host, int(port)), sites, mbit_per_s * 1e6 / 8, round_trip_s / 2))


if __name__ == "__main__":
    typer.run(main)
