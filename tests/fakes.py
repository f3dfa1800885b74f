"""Stand-ins written by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class ManualClock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, wall_s: float = 1_700_000_000.0, monotonic_s: float = 1_000.0) -> None:
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._changed: asyncio.Event | None = None

    def wall_s(self) -> float:
        return self._wall_s

    def monotonic_s(self) -> float:
        return self._monotonic_s

    @property
    def sleepers(self) -> int:
        """How many tasks sleep now."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has been advanced past it; at once (after a turn of the loop) for 0 or less."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic_s + seconds, next(self._order), future))
        if self._changed is not None:
            self._changed.set()
        await future

    async def advance(self, seconds: float) -> None:
        """Let time pass; wake sleepers in order of their time, each with the clock at its own instant."""
        end_s = self._monotonic_s + seconds
        while True:
            await settle()
            if not self._sleepers or self._sleepers[0][0] > end_s:
                break
            due_s, _, future = heapq.heappop(self._sleepers)
            self._move_to(due_s)
            if not future.done():
                future.set_result(None)
        self._move_to(end_s)
        await settle()

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator might."""
        self._wall_s += seconds

    async def until_sleeping(self, count: int = 1) -> None:
        """Return once at least `count` tasks sleep: whatever they had to do before is done."""
        while self.sleepers < count:
            self._changed = asyncio.Event()
            await self._changed.wait()

    def _move_to(self, monotonic_s: float) -> None:
        self._wall_s += max(0.0, monotonic_s - self._monotonic_s)
        self._monotonic_s = max(self._monotonic_s, monotonic_s)


async def settle(turns: int = 10) -> None:
    """Let tasks that are ready run; does not wait for input or output."""
    for _ in range(turns):
        await asyncio.sleep(0)
