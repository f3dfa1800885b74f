"""A bad link: a TCP proxy with the rate, delay and hiccups of a real one. Loopback only.

All connections share the link: a `Link` gives them turns, as the queue of a fair router does; in a `Modem` they stand
in one queue. A lost packet shows to TCP's user as a stall of about a round trip and a half, and `loss` makes that.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

_SEGMENT = 1448


@dataclass
class Link:
    """One direction's properties, and what went over both.

    Attributes:
        bytes_per_s: Rate shared by all connections, for each direction.
        delay_s: One way.
        loss: Share of segments that have to be sent again.
        window_bytes: Most that one connection may have on its way.
    """

    bytes_per_s: float
    delay_s: float = 0.0
    loss: float = 0.0
    seed: int = 0
    window_bytes: int = 64 * _SEGMENT
    passed_bytes: int = 0
    _free_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def carry(self, size: int, direction: str) -> float:
        """Take a turn of the link for `size` bytes; gives when they arrive, on the loop's clock."""
        now = asyncio.get_running_loop().time()
        start = max(self._free_at.get(direction, now), now)
        end = start + size / self.bytes_per_s
        self._free_at[direction] = end
        self.passed_bytes += size
        await asyncio.sleep(end - now)
        return end + self.delay_s + self._stall_s(size)

    def _stall_s(self, size: int) -> float:
        return 3 * self.delay_s if self._random.random() < self.loss * -(-size // _SEGMENT) else 0.0


@dataclass
class Modem(Link):
    """A link with one queue for each direction, first come, first served: whoever comes waits for all that is in it.

    Attributes:
        queue_bytes: What the queue holds; while it is full, nobody gets in.
        longest_s: The longest that anything has stood in it.
    """

    queue_bytes: int = 1 << 20
    window_bytes: int = 1 << 22
    longest_s: float = 0.0
    _doors: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def carry(self, size: int, direction: str) -> float:
        """Get into the queue; when all before it and it will have left it, and arrived."""
        async with self._doors.setdefault(direction, asyncio.Lock()):
            now = asyncio.get_running_loop().time()
            end = max(self._free_at.get(direction, now), now) + size / self.bytes_per_s
            await asyncio.sleep(end - self.queue_bytes / self.bytes_per_s - now)
            self._free_at[direction] = end
            self.passed_bytes += size
            self.longest_s = max(self.longest_s, end - asyncio.get_running_loop().time())
        return end + self.delay_s + self._stall_s(size)


@dataclass
class CountedLink(Link):
    """A link that knows what has gone up, and stops there once more than `hold_bytes` have."""

    up_bytes: int = 0
    hold_bytes: int | None = None

    async def carry(self, size: int, direction: str) -> float:
        """Take a turn; on the way up, not any more when enough has gone."""
        if direction == "up":
            if self.hold_bytes is not None and self.up_bytes > self.hold_bytes:
                await asyncio.Event().wait()
            self.up_bytes += size
        return await super().carry(size, direction)


class SilentLink(Link):
    """A link that keeps its connections and, once it is silent, drops what comes."""

    is_silent = False

    async def carry(self, size: int, direction: str) -> float:
        if self.is_silent:
            await asyncio.Event().wait()
        return await super().carry(size, direction)


class CutLink(Link):
    """A link that can be cut; `broke` is set once a connection has felt it."""

    is_cut = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.broke = asyncio.Event()

    async def carry(self, size: int, direction: str) -> float:
        if self.is_cut:
            self.broke.set()
            raise ConnectionResetError
        return await super().carry(size, direction)

    async def cut(self) -> None:
        """Cut it, until a connection has felt it."""
        self.broke.clear()
        self.is_cut = True
        await self.broke.wait()
        self.is_cut = False


class Progress:
    """How many chunks of a transfer are through, to be waited for."""

    def __init__(self) -> None:
        self._done = 0
        self._changed = asyncio.Event()

    def __call__(self, done: int, _: int) -> None:
        self._done = done
        self._changed.set()

    async def reached(self, chunks: int) -> None:
        while self._done < chunks:
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def over(link: Link, target: Callable[[], tuple[str, int]]) -> AsyncIterator[str]:
    """An address through which `target` is reached over the link."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*target(), limit=2 * _SEGMENT)
        except OSError:
            writer.close()
            return
        with suppress(asyncio.CancelledError):
            await asyncio.gather(
                _pump(link, reader, far_writer, "up"), _pump(link, far_reader, writer, "down"), return_exceptions=True
            )

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2 * _SEGMENT)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
    """Segments in order; while one is on its way the next is already taking its turn."""
    arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=link.window_bytes // _SEGMENT)
    deliver = asyncio.create_task(_deliver(arrivals, writer))
    try:
        while segment := await reader.read(_SEGMENT):
            await arrivals.put((await link.carry(len(segment), direction), segment))
        await arrivals.put((0.0, b""))
        await deliver
    finally:
        deliver.cancel()
        writer.close()


async def _deliver(arrivals: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, segment = await arrivals.get()
        await asyncio.sleep(due - loop.time())
        if not segment:
            return
        writer.write(segment)
        await writer.drain()
