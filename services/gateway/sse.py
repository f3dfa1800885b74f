"""Server-sent events: a stream of facts as text, alive while nothing happens, with a proper end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cortex_common.clock import Clock
from cortex_common.errors import CortexError
from services.gateway.problems import problem_of

MEDIA_TYPE = "text/event-stream"
_KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = b": still here\n\n"
_CHECK_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; `data` is a single line."""

    event: str
    data: str
    event_id: str = ""

    def encoded(self) -> bytes:
        """As it goes over the wire."""
        identity = f"id: {self.event_id}\n" if self.event_id else ""
        return f"{identity}event: {self.event}\ndata: {self.data}\n\n".encode()


async def encoded_events(
    source: AsyncGenerator[ServerEvent],
    clock: Clock,
    stopping: asyncio.Event,
    require: Callable[[], None] | None = None,
) -> AsyncGenerator[bytes]:
    """The events of `source` as text, with a comment in each silence of 15 s.

    Ends with an event `end` when the source ends, and with `problem` when it fails; without either when the gateway
    stops, so that a client connects again.

    Args:
        source: Closed at the end.
        clock: Does the waiting.
        stopping: Set when the gateway stops.
        require: Called every 5 s; what it raises ends the stream as a failure of the source does.
    """
    stopped: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    ends = {stopped} if require is None else {stopped, asyncio.create_task(_refused(require, clock))}
    try:
        async with aclosing(source):
            while True:
                upcoming = asyncio.create_task(_next(source))
                try:
                    while not await _settled(upcoming, ends, clock):
                        yield _KEEP_ALIVE
                finally:
                    upcoming.cancel()
                    await asyncio.wait({upcoming})
                for each in ends:
                    if each.done() and isinstance(refusal := each.result(), CortexError):
                        raise refusal
                if upcoming.cancelled():
                    return
                event = upcoming.result()
                yield event.encoded() if event else ServerEvent("end", "{}").encoded()
                if event is None:
                    return
    except CortexError as error:
        yield ServerEvent("problem", problem_of(error).model_dump_json()).encoded()
    finally:
        for each in ends:
            each.cancel()


async def _refused(require: Callable[[], None], clock: Clock) -> CortexError:
    """Why the one who reads may read no longer, once that is so."""
    while True:
        await clock.sleep(_CHECK_EVERY_S)
        try:
            require()
        except CortexError as error:
            return error


async def _next(source: AsyncGenerator[ServerEvent]) -> ServerEvent | None:
    return await anext(source, None)


async def _settled(upcoming: asyncio.Task[ServerEvent | None], ends: set[asyncio.Task[Any]], clock: Clock) -> bool:
    """Wait for the next event or for what ends the stream; False when nothing happened for a while."""
    pause = asyncio.create_task(clock.sleep(_KEEP_ALIVE_S))
    try:
        waits: set[asyncio.Task[Any]] = {upcoming, pause, *ends}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        pause.cancel()
    return upcoming.done() or any(each.done() for each in ends)
