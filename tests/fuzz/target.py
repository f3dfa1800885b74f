"""What is said of a decoder that sees bytes from outside, and what several of them are given."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority

NOW_S = 1_800_000_000.0
WRONG = (InvalidArgumentError,)
BAD = (CorruptError, InvalidArgumentError)


@dataclass(frozen=True)
class Target:
    """A decoder.

    Attributes:
        decode: Takes any bytes.
        allowed: What it documents to raise; anything else is a finding.
        seeds: Good inputs to start from.
    """

    decode: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]


def from_proto(kind: type[Message], read: Callable[[Any], object]) -> Callable[[bytes], object]:
    """A message that gRPC has parsed: bytes it cannot parse never reach who reads it."""

    def decode(data: bytes) -> object:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return None
        return read(message)

    return decode


@cache
def folder() -> Path:
    """For files that decoders need."""
    kept = tempfile.TemporaryDirectory(prefix="cortex-fuzz-")
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def authority() -> Authority:
    return Authority.create("cortex", folder() / "authority")


@cache
def tls(role: Role = Role.DISCOVERY) -> TlsFiles:
    life = dt.timedelta(days=3650)
    return authority().issue(Identity("cortex", role, NodeName("n1")), ["localhost"], folder() / role.value, life)
