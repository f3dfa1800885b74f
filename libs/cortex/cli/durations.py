"""Spans of time as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

from cortex_common.errors import InvalidArgumentError

_LIFE = re.compile(r"(?P<count>\d+)(?P<unit>[smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_life(text: str) -> timedelta:
    """A duration such as 12h or 30d.

    Raises:
        InvalidArgumentError: anything else.
    """
    match = _LIFE.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(f"life {text!r} given; allowed: a number and s, m, h or d, for example 30d")
    return timedelta(**{_UNITS[match["unit"]]: int(match["count"])})
