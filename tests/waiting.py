"""Waiting for a condition that other processes bring about."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: it does not within `timeout_s`.
    """
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        threading.Event().wait(0.05)


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """`until` for tests that share the loop with what they wait for."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - files have no event to wait for
            await asyncio.sleep(0.01)
