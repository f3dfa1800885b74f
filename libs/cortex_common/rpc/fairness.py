"""What one caller may take of a server, so that there is something left for the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cortex_common.buckets import Allowance, Buckets
from cortex_common.clock import Clock
from cortex_common.errors import OverloadedError
from cortex_common.identity import Identity
from cortex_common.rpc.metrics import THROTTLED

_CALLS = Allowance(per_s=500.0, burst=1000.0)
_STRANGERS = Allowance(per_s=10.0, burst=200.0)
_OUTSIDERS = Allowance(per_s=10.0, burst=1000.0)


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """Limits of each identity.

    Attributes:
        calls: RPCs begun: a second, and at once.
        open_calls: RPCs at a time; about a quarter of what the whole server bears.
        connections: With a call open on them.
        strangers: Calls of callers without certificate, from each address, where such calls are allowed.
        outsiders: Refused calls of callers whose certificate or pass is not good (any more), from each address.
    """

    calls: Allowance = _CALLS
    open_calls: int = 500
    connections: int = 64
    strangers: Allowance = _STRANGERS
    outsiders: Allowance = _OUTSIDERS


CALLER_LIMITS = CallerLimits()


class ThrottledError(OverloadedError):
    """One caller has or does too much: this call was not let in."""


class Callers:
    """Counts what each identity has open, and how often it calls."""

    def __init__(self, limits: CallerLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._buckets = Buckets(limits.calls)
        self._strangers = Buckets(limits.strangers)
        self._outsiders = Buckets(limits.outsiders)
        self._open: dict[Identity, Counter[str]] = {}

    @contextmanager
    def serving(self, caller: Identity, peer: str) -> Iterator[None]:
        """Count a call for as long as the block lasts.

        Args:
            caller: Who calls.
            peer: Address and port of the connection.

        Raises:
            ThrottledError: the caller has or does too much; says what is allowed.
        """
        mine = self._open.get(caller, Counter())
        self._check(caller, mine, peer)
        self._open[caller] = mine
        mine[peer] += 1
        try:
            yield
        finally:
            mine[peer] -= 1
            if not mine[peer]:
                del mine[peer]
            if not mine:
                self._open.pop(caller, None)

    def stranger(self, peer: str) -> None:
        """Count a call of somebody without certificate.

        Raises:
            ThrottledError: too many come from this address.
        """
        self._from_address(self._strangers, "strangers", peer)

    def outsider(self, peer: str) -> None:
        """Count a call of somebody whose certificate or pass is not good.

        Raises:
            ThrottledError: too many come from this address.
        """
        self._from_address(self._outsiders, "outsiders", peer)

    def _from_address(self, buckets: Buckets, what: str, peer: str) -> None:
        address = peer.rpartition(":")[0]
        if wait_s := buckets.wait_s(address, self._clock.monotonic_s()):
            raise _refused(what, f"too many calls come from {address}", math.ceil(wait_s))

    def _check(self, caller: Identity, mine: Counter[str], peer: str) -> None:
        limits = self._limits
        if mine.total() >= limits.open_calls:
            raise _refused("open", f"{caller.uri} has {mine.total()} calls open; allowed: {limits.open_calls}")
        if peer not in mine and len(mine) >= limits.connections:
            raise _refused("connections", f"{caller.uri} has {len(mine)} connections; allowed: {limits.connections}")
        if wait_s := self._buckets.wait_s(caller.uri, self._clock.monotonic_s()):
            allowed = f"{limits.calls.per_s:g} a second, {limits.calls.burst:g} at once"
            raise _refused("rate", f"{caller.uri} calls too often; allowed: {allowed}", math.ceil(wait_s))


def _refused(what: str, message: str, retry_after_s: int = 1) -> ThrottledError:
    THROTTLED.labels(what).inc()
    return ThrottledError(message, retry_after_s)
