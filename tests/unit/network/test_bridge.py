"""The bridge keeps a line up, whatever the transport does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from cortex_common.errors import CortexError, UnauthenticatedError, UnavailableError
from cortex_common.network import messages as m
from cortex_common.network.bridge import Connected, Disconnected, ReconnectPolicy, TenzroBridge
from cortex_common.network.work import Place
from tests.fakes import ManualClock

NOTHING = m.Assignments(())


class ScriptedTransport:
    """Each line does what the next step says: an error, or messages to deliver before it breaks."""

    what = "the test's network"

    def __init__(self, *steps: CortexError | list[m.ToNode]) -> None:
        self.steps = list(steps)
        self.lines = 0

    async def listen(self, deliver: Callable[[m.ToNode], None]) -> None:
        self.lines += 1
        step = self.steps.pop(0) if self.steps else UnavailableError("nobody there")
        if isinstance(step, CortexError):
            raise step
        for message in step:
            deliver(message)

    async def ask(self, message: m.FromNode, *, timeout_s: float, waits: bool) -> m.ToNode:
        return m.ReportAck(wanted=waits)

    def to(self, address: str, aggregator: str) -> Any:
        return address

    def announcer(self) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self.steps.clear()


def bridge_over(transport: ScriptedTransport, clock: ManualClock, **policy: Any) -> tuple[TenzroBridge, list[object]]:
    bridge = TenzroBridge(cast(Any, transport), clock, ReconnectPolicy(**policy))
    heard: list[object] = []
    for kind in (Connected, Disconnected, m.Assignments):
        bridge.on(kind, heard.append)
    return bridge, heard


async def test_messages_are_routed_and_a_broken_line_is_opened_again() -> None:
    clock = ManualClock()
    transport = ScriptedTransport([NOTHING, NOTHING], UnavailableError("away"), [NOTHING])
    bridge, heard = bridge_over(transport, clock)
    task = asyncio.create_task(bridge.run())
    for _ in range(2):
        await clock.until_sleeping()
        await clock.advance(1.0)
    await clock.until_sleeping()
    closed = Disconnected("the test's network closed the line")
    assert heard == [Connected(), NOTHING, NOTHING, closed, Connected(), NOTHING, closed]
    assert not bridge.is_open
    task.cancel()


async def test_failures_in_a_row_use_the_attempts_up_and_a_line_gives_them_back() -> None:
    clock = ManualClock()
    away = UnavailableError("away")
    transport = ScriptedTransport(away, away, [NOTHING], away, away, UnavailableError("the last"))
    bridge, _ = bridge_over(transport, clock, attempts=3)
    task = asyncio.create_task(bridge.run())
    while not task.done():
        await clock.advance(10.0)
    with pytest.raises(UnavailableError, match="the last"):
        await task
    assert transport.lines == 6


async def test_a_fatal_error_is_not_tried_again() -> None:
    transport = ScriptedTransport(UnauthenticatedError("the token expired"))
    bridge, _ = bridge_over(transport, ManualClock(), fatal=(UnauthenticatedError,))
    with pytest.raises(UnauthenticatedError, match="expired"):
        await bridge.run()
    assert transport.lines == 1


def test_waits_double_up_to_the_limit() -> None:
    policy = ReconnectPolicy(first_wait_s=0.2, longest_wait_s=10.0)
    for failures in range(20):
        longest = min(10.0, 0.2 * 2**failures)
        assert longest / 2 <= policy.wait_s(failures) <= longest


async def test_reports_say_whether_their_work_is_wanted() -> None:
    bridge, _ = bridge_over(ScriptedTransport(), ManualClock())
    report = m.TrainingMetrics(Place("a", "j", 1, 0), "training")
    assert await bridge.report(report, is_urgent=True)
    assert not await bridge.report(report, is_urgent=False)
