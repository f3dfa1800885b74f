"""The clock of the tests."""

from __future__ import annotations

import asyncio

from cortex_common.lifecycle import sleep_unless
from tests.fakes import ManualClock


async def test_sleepers_wake_in_order_and_at_their_time(clock: ManualClock) -> None:
    woken: list[tuple[str, float]] = []
    start_s = clock.monotonic_s()

    async def sleeper(name: str, *seconds: float) -> None:
        for each in seconds:
            await clock.sleep(each)
            woken.append((name, clock.monotonic_s() - start_s))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sleeper("a", 2, 2))
        tasks.create_task(sleeper("b", 3))
        await clock.until_sleeping(2)
        await clock.advance(10)
    assert woken == [("a", 2), ("b", 3), ("a", 4)]
    assert clock.monotonic_s() - start_s == 10


async def test_a_wait_ends_early_when_told_to_stop(clock: ManualClock) -> None:
    stop = asyncio.Event()
    wait = asyncio.create_task(sleep_unless(stop, 100, clock))
    await clock.until_sleeping()
    stop.set()
    assert await wait is True
    assert clock.sleepers == 0
    wait = asyncio.create_task(sleep_unless(asyncio.Event(), 100, clock))
    await clock.until_sleeping()
    await clock.advance(100)
    assert await wait is False
