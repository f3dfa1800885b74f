"""Streams that outlive their connections: what is opened again, when it is given up, and nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cortex_common.errors import NotFoundError, UnavailableError
from services.gateway.following import unbroken


class Upstream:
    """Each opening gives the next script: items, then an error, or the end."""

    def __init__(self, *scripts: list[int | Exception]) -> None:
        self.scripts = list(scripts)
        self.opened = 0
        self.closed = 0

    async def stream(self) -> AsyncGenerator[int]:
        script = self.scripts[min(self.opened, len(self.scripts) - 1)]
        self.opened += 1
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1


async def drained(stream: AsyncGenerator[int], into: list[int]) -> None:
    async for item in stream:
        into.append(item)


AWAY = UnavailableError("coordinator cannot be reached")


async def test_a_stream_goes_on_where_it_broke(clock):
    upstream, found = Upstream([1, 2, AWAY], [AWAY], [3]), []
    following = asyncio.create_task(drained(unbroken(upstream.stream, clock, 60.0), found))
    await clock.until_sleeping()
    assert found == [1, 2]
    await clock.advance(1.0)
    await following
    assert found == [1, 2, 3]
    assert (upstream.opened, upstream.closed) == (3, 3)


async def test_a_peer_that_is_away_for_too_long_is_given_up(clock):
    upstream, found = Upstream([1, AWAY], [AWAY]), []
    following = asyncio.create_task(drained(unbroken(upstream.stream, clock, 60.0), found))
    await clock.until_sleeping()
    await clock.advance(50.0)
    assert not following.done()
    assert upstream.opened < 20  # it waits longer and longer
    await clock.advance(20.0)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await following


async def test_a_stream_that_was_silent_for_long_had_an_answer(clock):
    async def silent() -> AsyncGenerator[int]:
        await clock.sleep(1800.0)
        raise AWAY
        yield

    following = asyncio.create_task(drained(unbroken(silent, clock, 60.0), []))
    await clock.until_sleeping()
    await clock.advance(4 * 1800.0)
    assert not following.done()
    following.cancel()
    await asyncio.wait({following})


async def test_any_other_error_is_the_end_at_once(clock):
    upstream = Upstream([1, NotFoundError("no such job")])
    with pytest.raises(NotFoundError):
        await drained(unbroken(upstream.stream, clock, 60.0), [])
    assert upstream.opened == 1


async def test_a_reader_who_goes_away_closes_the_stream(clock):
    upstream = Upstream([1, 2])
    stream = unbroken(upstream.stream, clock, 60.0)
    assert await anext(stream) == 1
    await stream.aclose()
    assert upstream.closed == 1
