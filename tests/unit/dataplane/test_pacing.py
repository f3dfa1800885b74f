"""Bulk transfers at a rate, jobs taking turns."""

from __future__ import annotations

import asyncio

import pytest

from cortex_common.clock import SystemClock
from cortex_common.job.quantities import parse_rate_bytes_per_s
from cortex_common.transfer.pacing import UNPACED, Pacer, Paces
from tests.fakes import ManualClock, settle


class Sender:
    """Sends messages of one flow, one after the other, as an upload does; `sent_s` is when each went."""

    def __init__(self, pacer: Pacer, clock: ManualClock, flow: str, sizes: list[int]) -> None:
        self.flow, self.sent_s, self.sent = flow, [], 0
        self._pacer, self._clock, self._sizes = pacer, clock, sizes
        self._begun_s = clock.monotonic_s()
        self.task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        for size in self._sizes:
            await self._pacer.take(self.flow, size)
            self.sent_s.append(self._clock.monotonic_s() - self._begun_s)
            self.sent += size


async def test_messages_go_at_the_rate_and_the_first_at_once(clock: ManualClock) -> None:
    sender = Sender(Pacer(100.0, clock), clock, "a", [50, 100, 25, 10])
    await clock.advance(10)
    assert sender.sent_s == pytest.approx([0, 0.5, 1.5, 1.75])


async def test_time_without_traffic_is_not_saved_up(clock: ManualClock) -> None:
    pacer = Pacer(100.0, clock)
    await clock.advance(100)
    sender = Sender(pacer, clock, "a", [100] * 3)
    await clock.advance(10)
    assert sender.sent_s == pytest.approx([0, 1, 2])


@pytest.mark.parametrize("sizes", [(100, 100), (400, 50), (1000, 1)])
async def test_jobs_share_by_bytes_whatever_the_size_of_their_messages(
    clock: ManualClock, sizes: tuple[int, int]
) -> None:
    """And whatever the number of their transfers: four of one against one of the other."""
    pacer = Pacer(1000.0, clock)
    few = Sender(pacer, clock, "few", [sizes[0]] * 10_000)
    many = [Sender(pacer, clock, "many", [sizes[1]] * 10_000) for _ in range(4)]
    await clock.advance(30)
    total = sum(each.sent for each in many)
    assert few.sent + total == pytest.approx(30_000, abs=2 * max(sizes))
    assert few.sent == pytest.approx(total, abs=2 * max(sizes))
    for sender in (few, *many):
        sender.task.cancel()


async def test_a_job_that_was_away_does_not_make_up_for_it(clock: ManualClock) -> None:
    pacer = Pacer(100.0, clock)
    early = Sender(pacer, clock, "early", [100] * 100)
    await clock.advance(20)
    late, before = Sender(pacer, clock, "late", [100] * 100), early.sent
    await clock.advance(10)
    assert early.sent - before == pytest.approx(late.sent, abs=100)
    for sender in (early, late):
        sender.task.cancel()


async def test_who_gives_up_waiting_takes_nothing(clock: ManualClock) -> None:
    pacer = Pacer(100.0, clock)
    first, gone = Sender(pacer, clock, "a", [100]), Sender(pacer, clock, "a", [100_000])
    last = Sender(pacer, clock, "b", [100])
    await settle()
    gone.task.cancel()
    await clock.advance(2)
    assert (first.sent, gone.sent, last.sent_s) == (100, 0, [1.0])


async def test_without_a_limit_nobody_waits() -> None:
    paces = Paces.of(None, 1e6, SystemClock())
    assert paces.up is UNPACED
    await paces.up.take("a", 1 << 60)
    assert isinstance(paces.down, Pacer)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("10Mbit/s", 1_250_000), ("1.5 Gbit/s", 187_500_000), ("2MB/s", 2_000_000), ("1000kbit/s", 125_000)],
)
def test_rates_as_people_write_them(text: str, bytes_per_s: float) -> None:
    assert parse_rate_bytes_per_s(text) == bytes_per_s


@pytest.mark.parametrize(
    "value", ["10", "10Mbit", "-1Mbit/s", "0Mbit/s", "64kbit/s", 10_000_000, True, "", "1Tbit/s", "x"]
)
def test_what_is_no_rate_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="10Mbit/s"):
        parse_rate_bytes_per_s(value)
