"""Time as an argument; the only module that touches `time`."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What time it is, and waiting."""

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC: for display, certificates and logs, never for ordering."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start that never go back: for leases and deadlines."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""


class SystemClock:
    """The machine's clocks."""

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await asyncio.sleep(seconds)
