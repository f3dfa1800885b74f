"""Numbers, durations and sizes as people write them in job files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt]?[iI]?[bB]?)")
_PREFIXES = "KMGT"
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(bit|B)/s", re.IGNORECASE)
LONGEST_S = 100 * 365.25 * 86400.0
_LARGEST_BYTES = (1 << 62) - 1
_LEAST_BYTES_PER_S = 125_000.0


def parse_number(value: object) -> object:
    """A number, or text that is one: YAML reads 1e-3 as text. Left alone, true would be 1.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return value
    raise ValueError("allowed: a number")


def parse_duration_s(value: object) -> float:
    """Seconds from a number or from text such as `90s`, `1.5s`, `5m`, `1h30m`.

    Raises:
        ValueError: anything else.
    """
    # Comparing needs no conversion: a whole number may be larger than any float.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_S:
        return float(value)
    if isinstance(value, str) and value:
        match = _DURATION.fullmatch(value.strip())
        if match and any(match.groups()):
            hours, minutes, seconds = (float(part or 0) for part in match.groups())
            total_s = hours * 3600 + minutes * 60 + seconds
            if total_s <= LONGEST_S:
                return total_s
    raise ValueError("allowed: seconds as a number, or text such as 90s, 5m, 1h30m; at most 100 years")


def parse_size_bytes(value: object) -> int:
    """Bytes from a whole number or from text such as `512MiB`, `2GiB`, `1GB`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_BYTES:
        return value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match:
            unit = match[2].upper()
            power = _PREFIXES.index(unit[0]) + 1 if unit[:1] in tuple(_PREFIXES) else 0
            size = float(match[1]) * (1024 if "I" in unit else 1000) ** power
            if size <= _LARGEST_BYTES:
                return int(size)
    raise ValueError("allowed: bytes as a whole number, or text such as 512MiB, 2GiB; less than 2^62")


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


@dataclass(frozen=True, slots=True)
class Written:
    """Reads a number as people write it. Stands after the bounds: they would be missing from schemas if it came first.

    Attributes:
        parse: From what was written to the number; raises ValueError.
        text: What it looks like as text, for the schema of what may be given; what is told is a number.
    """

    parse: Callable[[object], object]
    text: re.Pattern[str]

    def __get_pydantic_core_schema__(self, source: type[object], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Parse before anything else looks at it."""
        return core_schema.no_info_before_validator_function(self.parse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The number with its bounds, or text."""
        number = handler(schema)
        if handler.mode == "serialization":
            return number
        return {"anyOf": [number, {"type": "string", "pattern": rf"^\s*({self.text.pattern})\s*$"}]}


NUMBER = Written(parse_number, _NUMBER)
DURATION = Written(parse_duration_s, _DURATION)
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S), DURATION]
SizeBytes = Annotated[int, Field(ge=0, le=_LARGEST_BYTES), Written(parse_size_bytes, _SIZE)]
Rate = Annotated[float | None, BeforeValidator(lambda value: None if value is None else parse_rate_bytes_per_s(value))]
