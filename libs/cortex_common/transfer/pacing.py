"""Bulk transfers at no more than a rate, jobs taking turns, so that a slow link has room for heartbeats and orders.

Control never waits here: it has connections of its own, and the link to itself but for the message under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from cortex_common.clock import Clock, SystemClock


class Pace(Protocol):
    """Asked before a message is sent, or after one was received."""

    async def take(self, flow: str, size: int) -> None:
        """Wait for the turn of `size` bytes of this flow, which is a job's."""


class Unpaced:
    """No limit."""

    async def take(self, flow: str, size: int) -> None:
        """At once."""


UNPACED = Unpaced()


@dataclass(slots=True)
class _Turn:
    size: int
    granted: asyncio.Future[None]


@dataclass(slots=True)
class _Flow:
    """What waits, and the bytes granted, on a scale that all flows share."""

    granted_bytes: int
    waiting: deque[_Turn] = field(default_factory=deque)


class Pacer:
    """A token bucket as deep as one message: a message goes when those before it have had their time on the link.

    Of the flows that wait, the one that has been granted fewest bytes is next; one that comes back does not make up
    for the time it was away.
    """

    def __init__(self, bytes_per_s: float, clock: Clock | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock or SystemClock()
        self._free_s = self._clock.monotonic_s()
        self._flows: dict[str, _Flow] = {}
        self._level_bytes = 0
        self._serving: asyncio.Task[None] | None = None

    async def take(self, flow: str, size: int) -> None:
        """Wait for the turn of `size` bytes of this flow; who is cancelled meanwhile takes nothing."""
        turn = _Turn(size, asyncio.get_running_loop().create_future())
        known = self._flows.setdefault(flow, _Flow(self._level_bytes))
        known.granted_bytes = max(known.granted_bytes, self._level_bytes)
        known.waiting.append(turn)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        await turn.granted

    async def _serve(self) -> None:
        """Grant turns until nobody waits."""
        while waiting := [flow for flow in self._flows.values() if flow.waiting]:
            wait_s = self._free_s - self._clock.monotonic_s()
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            else:
                self._grant(min(waiting, key=lambda flow: flow.granted_bytes))

    def _grant(self, flow: _Flow) -> None:
        turn = flow.waiting.popleft()
        if turn.granted.done():
            return
        self._level_bytes = flow.granted_bytes
        flow.granted_bytes += turn.size
        self._free_s = max(self._free_s, self._clock.monotonic_s()) + turn.size / self._bytes_per_s
        turn.granted.set_result(None)
        # A flow that waits for nothing now may be back with its next message: it is remembered while it is ahead.
        gone = [name for name, it in self._flows.items() if not it.waiting and it.granted_bytes <= self._level_bytes]
        for name in gone:
            del self._flows[name]


@dataclass(frozen=True, slots=True)
class Paces:
    """Both directions of a node's link."""

    up: Pace = UNPACED
    down: Pace = UNPACED

    @classmethod
    def of(cls, up_bytes_per_s: float | None, down_bytes_per_s: float | None, clock: Clock) -> Paces:
        """None: no limit."""
        up, down = (Pacer(rate, clock) if rate else UNPACED for rate in (up_bytes_per_s, down_bytes_per_s))
        return cls(up, down)
