"""Spans of time as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

from cortex_common.errors import InvalidArgumentError

_LIFE = re.compile(r"(?P<count>\d{1,10})(?P<unit>[smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# A century: what is added to today must be a date still.
_LONGEST = timedelta(days=36_500)


def parse_life(text: str) -> timedelta:
    """A duration such as 12h or 30d.

    Raises:
        InvalidArgumentError: anything else, or more than a century.
    """
    match = _LIFE.fullmatch(text)
    seconds = int(match["count"]) * _UNIT_S[match["unit"]] if match else None
    if seconds is None or seconds > _LONGEST.total_seconds():
        raise InvalidArgumentError(
            f"life {text!r} given; allowed: a number and s, m, h or d, for example 30d, up to {_LONGEST.days}d"
        )
    return timedelta(seconds=seconds)
