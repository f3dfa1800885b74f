"""Token buckets: how often somebody may do something. Pure: the time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

_MAX_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """`per_s` on average, `burst` at once."""

    per_s: float
    burst: float


class Buckets:
    """A bucket for each key that was seen lately; one that is new, or forgotten, is full.

    Args:
        allowance: Of each key.
        max_keys: The longest unused bucket beyond this number is forgotten.
    """

    def __init__(self, allowance: Allowance, max_keys: int = _MAX_KEYS) -> None:
        self._allowance = allowance
        self._max_keys = max_keys
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, key: str, now_s: float, cost: float = 1.0) -> float:
        """Take `cost` out of a key's bucket and return 0, or, taking nothing, return how long until it is there."""
        level = self._level(key, now_s)
        wait_s = max(0.0, (min(cost, self._allowance.burst) - level) / self._allowance.per_s)
        self._levels[key] = (level if wait_s else level - cost, now_s)
        self._levels.move_to_end(key)
        while len(self._levels) > self._max_keys:
            self._levels.popitem(last=False)
        return wait_s

    def _level(self, key: str, now_s: float) -> float:
        level, then_s = self._levels.get(key, (self._allowance.burst, now_s))
        return min(self._allowance.burst, level + (now_s - then_s) * self._allowance.per_s)
