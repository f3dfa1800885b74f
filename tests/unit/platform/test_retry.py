"""Trying again while a peer is away."""

from __future__ import annotations

import pytest

from cortex_common.errors import ForbiddenError, UnavailableError
from cortex_common.rpc.retry import backoff
from cortex_common.transfer.retrying import Patience, until_through


class RecordingClock:
    """Sleeps take no time, but are counted."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def wall_s(self) -> float:
        return 0.0

    def monotonic_s(self) -> float:
        return sum(self.slept)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Peer:
    """Is away for the first calls."""

    def __init__(self, away: int, error: Exception | None = None) -> None:
        self.calls = 0
        self._away = away
        self._error = error or UnavailableError("away")

    async def call(self) -> str:
        self.calls += 1
        if self.calls <= self._away:
            raise self._error
        return "here"


async def test_a_peer_that_comes_back_is_reached() -> None:
    clock, peer = RecordingClock(), Peer(away=12)
    assert await backoff(clock)(peer.call) == "here"
    assert len(clock.slept) == 12
    assert all(0 <= wait <= min(10.0, 0.2 * 2**attempt) for attempt, wait in enumerate(clock.slept))


async def test_other_errors_are_not_repeated() -> None:
    peer = Peer(away=1, error=ForbiddenError("no"))
    with pytest.raises(ForbiddenError):
        await backoff(RecordingClock())(peer.call)
    assert peer.calls == 1


async def test_the_last_error_is_raised_on_giving_up() -> None:
    clock, peer = RecordingClock(), Peer(away=10_000)
    with pytest.raises(UnavailableError, match="away"):
        await backoff(clock, within_s=60)(peer.call)
    assert 60 <= clock.monotonic_s() <= 70
    peer = Peer(away=10_000)
    with pytest.raises(UnavailableError):
        await backoff(RecordingClock(), attempts=3)(peer.call)
    assert peer.calls == 3


async def test_each_wait_is_told() -> None:
    told: list[str] = []
    async for attempt in backoff(RecordingClock(), on_wait=lambda error, wait_s: told.append(f"{error} {wait_s >= 0}")):
        with attempt:
            if attempt.retry_state.attempt_number < 3:
                raise UnavailableError("away")
    assert told == ["away True", "away True"]


async def test_it_gives_up_when_the_caller_has_had_enough() -> None:
    peer = Peer(10)
    with pytest.raises(UnavailableError, match="away"):
        await backoff(RecordingClock(), enough=lambda: peer.calls == 3)(peer.call)
    assert peer.calls == 3


async def test_progress_renews_the_patience_of_a_transfer() -> None:
    clock = RecordingClock()
    patience = Patience(5.0, clock)
    clock.slept.append(4.0)
    patience.renew()
    clock.slept.append(4.0)
    assert not patience.is_over()
    clock.slept.append(1.0)
    assert patience.is_over()
    with pytest.raises(UnavailableError, match="away"):
        await until_through(Peer(10).call, clock, patience)
