"""Doorstep: connections that have not joined yet, however far they have come. There are never more than so many."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from cortex_common.logging import get_logger
from services.gateway import metrics

log = get_logger(__name__)


class Caller(Protocol):
    """A connection, as far as it can be dropped."""

    def drop(self) -> None:
        """End it at once, without a word."""


class Doorstep:
    """Who waits to be let in.

    When one more comes than there is room for, the address with most of them loses its oldest. So whoever opens
    connections and joins with none takes room from its own address only; and a node joins in a fraction of a second, so
    that it is in before it could be the oldest.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: dict[Caller, str] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def arrive(self, caller: Caller, address: str) -> None:
        """A connection has been made."""
        self._waiting[caller] = address
        if len(self._waiting) > self._room:
            self._turn_away()

    def leave(self, caller: Caller) -> None:
        """It was let in, or has gone."""
        self._waiting.pop(caller, None)

    def _turn_away(self) -> None:
        callers = Counter(self._waiting.values())
        most = max(callers.values())
        oldest = next(caller for caller, address in self._waiting.items() if callers[address] == most)
        log.info("caller_turned_away", peer=self._waiting.pop(oldest), waiting=len(self._waiting))
        metrics.SLOW.labels("join").inc()
        oldest.drop()
