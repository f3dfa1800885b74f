"""Small records that are appended to a file and synced once each: whole and right, or not there.

A record is its length, 8 bytes of its SHA-256, and its bytes. A kill or a power cut leaves at most a torn last record,
which does not read; so a record that reads was written whole, whatever order the disk wrote its pages in.
"""

from __future__ import annotations

import hashlib
import os

_LENGTH_BYTES = 4
_CHECK_BYTES = 8
_HEAD_BYTES = _LENGTH_BYTES + _CHECK_BYTES
MAX_RECORD_BYTES = 256 << 20


def record(data: bytes) -> bytes:
    """`data` as a record."""
    return len(data).to_bytes(_LENGTH_BYTES, "big") + _check(data) + data


def read_record(descriptor: int, position: int = 0) -> tuple[bytes, int] | None:
    """The record at a position of a file and where it ends; None when there is none, or a torn one."""
    head = os.pread(descriptor, _HEAD_BYTES, position)
    length = int.from_bytes(head[:_LENGTH_BYTES], "big")
    if len(head) < _HEAD_BYTES or not 0 < length <= MAX_RECORD_BYTES:
        return None
    data = os.pread(descriptor, length, position + _HEAD_BYTES)
    if len(data) < length or _check(data) != head[_LENGTH_BYTES:]:
        return None
    return data, position + _HEAD_BYTES + length


def last_record(descriptor: int) -> tuple[bytes, int]:
    """The last whole record of a file of records and where it ends; none and 0 when there is none."""
    data, end = b"", 0
    while (found := read_record(descriptor, end)) is not None:
        data, end = found
    return data, end


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK_BYTES]
