"""Durations and sizes as people write them in job files."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)
_PREFIXES = "KMGT"
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(bit|B)/s", re.IGNORECASE)
_LEAST_BYTES_PER_S = 125_000.0


def parse_duration_s(value: object) -> float:
    """Seconds from a number or from text such as `90s`, `1.5s`, `5m`, `1h30m`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    if isinstance(value, str) and value:
        match = _DURATION.fullmatch(value.strip())
        if match and any(match.groups()):
            hours, minutes, seconds = (float(part or 0) for part in match.groups())
            return hours * 3600 + minutes * 60 + seconds
    raise ValueError("allowed: seconds as a number, or text such as 90s, 5m, 1h30m")


def parse_size_bytes(value: object) -> int:
    """Bytes from a whole number or from text such as `512MiB`, `2GiB`, `1GB`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match:
            unit = match[2].upper()
            power = _PREFIXES.index(unit[0]) + 1 if unit[:1] in tuple(_PREFIXES) else 0
            return int(float(match[1]) * (1024 if "I" in unit else 1000) ** power)
    raise ValueError("allowed: bytes as a whole number, or text such as 512MiB, 2GiB")


def parse_rate_bytes_per_s(value: object) -> float:
    """Bytes a second from text such as `10Mbit/s`, `800kbit/s`, `1.5Gbit/s`, `2MB/s`.

    Raises:
        ValueError: anything else, and rates so low that a single chunk would be taken for a stream that idles.
    """
    match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        power = "KMG".index(match[2].upper()) + 1 if match[2] else 0
        rate: float = float(match[1]) * 1000**power / (8 if match[3].lower() == "bit" else 1)
        if rate >= _LEAST_BYTES_PER_S:
            return rate
    raise ValueError("allowed: text such as 10Mbit/s, 1.5Gbit/s or 2MB/s, at least 1Mbit/s")


Seconds = Annotated[float, BeforeValidator(parse_duration_s)]
SizeBytes = Annotated[int, BeforeValidator(parse_size_bytes)]
Rate = Annotated[float | None, BeforeValidator(lambda value: None if value is None else parse_rate_bytes_per_s(value))]
