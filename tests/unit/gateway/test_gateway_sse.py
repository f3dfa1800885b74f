"""Event streams: alive in silence, with a proper end, and nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cortex_common.errors import UnauthenticatedError, UnavailableError
from services.gateway.sse import ServerEvent, encoded_events


class Source:
    """Events as the test gives them; remembers that it was closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[ServerEvent | Exception | None] = asyncio.Queue()
        self.closed = False

    async def events(self) -> AsyncGenerator[ServerEvent]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


@pytest.fixture
def source():
    return Source()


async def test_events_are_text_and_the_end_is_named(source, clock):
    for item in (ServerEvent("status", '{"round": 1}'), ServerEvent("event", "{}", "7"), None):
        source.queue.put_nowait(item)
    pieces = [piece async for piece in encoded_events(source.events(), clock, asyncio.Event())]
    assert pieces == [
        b'event: status\ndata: {"round": 1}\n\n',
        b"id: 7\nevent: event\ndata: {}\n\n",
        b"event: end\ndata: {}\n\n",
    ]
    assert source.closed


async def test_silence_is_filled_with_comments(source, clock):
    stream = encoded_events(source.events(), clock, asyncio.Event())
    first = asyncio.create_task(anext(stream))
    await clock.until_sleeping()
    await clock.advance(15.0)
    assert (await first).startswith(b":")
    source.queue.put_nowait(ServerEvent("status", "{}"))
    assert await anext(stream) == b"event: status\ndata: {}\n\n"
    await stream.aclose()
    assert source.closed


async def test_a_failure_is_told_as_a_problem(source, clock):
    source.queue.put_nowait(UnavailableError("coordinator cannot be reached"))
    pieces = [piece async for piece in encoded_events(source.events(), clock, asyncio.Event())]
    assert len(pieces) == 1
    assert pieces[0].startswith(b"event: problem\ndata: {")
    assert b"coordinator cannot be reached" in pieces[0]
    assert source.closed


async def test_the_gateways_end_ends_the_stream_without_a_last_event(source, clock):
    stop = asyncio.Event()
    stream = encoded_events(source.events(), clock, stop)
    first = asyncio.create_task(anext(stream, None))
    await clock.until_sleeping()
    stop.set()
    assert await first is None
    assert source.closed


async def test_a_reader_who_goes_away_closes_the_source(source, clock):
    stream = encoded_events(source.events(), clock, asyncio.Event())
    first = asyncio.create_task(anext(stream, None))
    await clock.until_sleeping()
    first.cancel()
    await asyncio.wait({first})
    assert source.closed


async def test_who_may_read_no_longer_is_told_why_however_busy_the_stream(source, clock):
    refusals: list[UnauthenticatedError] = []

    def require() -> None:
        if refusals:
            raise refusals[0]

    stream = encoded_events(source.events(), clock, asyncio.Event(), require)
    source.queue.put_nowait(ServerEvent("status", "1"))
    assert b"status" in await anext(stream)
    await clock.until_sleeping()
    await clock.advance(60.0)
    source.queue.put_nowait(ServerEvent("status", "2"))
    assert b"status" in await anext(stream)
    refusals.append(UnauthenticatedError("token 'ann' was revoked"))
    source.queue.put_nowait(ServerEvent("status", "3"))
    await clock.until_sleeping()
    await clock.advance(5.0)
    pieces = [piece async for piece in stream]
    assert len(pieces) == 1
    assert pieces[0].startswith(b"event: problem\ndata: {")
    assert b"'ann' was revoked" in pieces[0]
    assert source.closed
