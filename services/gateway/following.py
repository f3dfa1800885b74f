"""Streams from the coordinator that outlive their connections."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from cortex_common.clock import Clock
from cortex_common.errors import UnavailableError
from cortex_common.logging import get_logger

log = get_logger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
# A silent stream that held this long had an answer.
_HELD_S = 30.0
_Item = TypeVar("_Item")


async def unbroken(
    opened: Callable[[], AsyncGenerator[_Item]], clock: Clock, patience_s: float
) -> AsyncGenerator[_Item]:
    """The items of a stream that is opened again whenever it breaks; ends when it ends.

    Streams break in the best of networks: connections age and are renewed, a coordinator is replaced.

    Args:
        opened: Opens the stream; called again it is to begin where the last one ended.
        clock: Measures, and waits between attempts.
        patience_s: Give up when there was no answer for so long.

    Raises:
        UnavailableError: the peer was away for too long. Any other error of the stream at once.
    """
    answered_s, pause_s = clock.monotonic_s(), _FIRST_PAUSE_S
    while True:
        opened_s = clock.monotonic_s()
        try:
            async with aclosing(opened()) as items:
                async for item in items:
                    answered_s, pause_s = clock.monotonic_s(), _FIRST_PAUSE_S
                    yield item
                return
        except UnavailableError as error:
            now_s = clock.monotonic_s()
            if now_s - opened_s >= _HELD_S:
                answered_s, pause_s = now_s, _FIRST_PAUSE_S
            if now_s - answered_s >= patience_s:
                raise
            log.info("stream_broke", reason=error.message, again_in_s=pause_s)
        await clock.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
