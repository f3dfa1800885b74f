"""The audit log: an append-only file of records, each bound to the one before it by a hash, its head signed.

Changing, removing or inserting a record breaks the chain; cutting records off the end contradicts a signed head taken
before. Old segments are removed when the log is full: a record says which is the first one then.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError

SEGMENT_BYTES, SEGMENTS = 4 << 20, 16
START = "0" * 64
"""Stands for the hash before the first record."""
_SEGMENT = "audit-*.jsonl"
_REMOVAL = {
    "what": "audit log",
    "decision": "allowed",
    "code": "OK",
    "reason": "the log is full: the records before this first one were removed",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is recorded.

    Attributes:
        who: SPIFFE id of the caller; empty when nobody was recognised.
        serial: Of the caller's certificate, hexadecimal.
        on_behalf_of: The person behind a gateway.
        what: Full method name.
        about: The object acted on, e.g. `job_id=…`.
        decision: `allowed` or `refused`.
        code: gRPC status.
        reason: Why it was refused, or failed.
        peer: Network address of the caller.
        repeats: How many more of the same came since the last record of it.
    """

    who: str
    what: str
    decision: str
    code: str
    serial: str = ""
    on_behalf_of: str = ""
    about: str = ""
    reason: str = ""
    peer: str = ""
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record: its number and hash. Number 0 stands for an empty log."""

    number: int = 0
    hash: str = START


class AuditLog:
    """Appends to a log; one writer a directory. Not for several threads at once.

    Args:
        directory: Of the segments.
        segment_bytes: A new file is begun beyond this size.
        segments: The oldest files beyond this number, at least 2, are removed.
    """

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES, segments: int = SEGMENTS) -> None:
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._segments = segments
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path, self.head = self._recovered()

    def append(self, entry: Entry, at_s: float) -> Head:
        """Add a record; it is on the disk when this returns.

        One more comes before it when old ones are removed: which is the first one then.

        Raises:
            OSError: it is not, and the log is as before.
        """
        said: list[dict[str, Any]] = [{name: value for name in Entry.__slots__ if (value := getattr(entry, name))}]
        path = self._path
        if path is None or path.stat().st_size >= self._segment_bytes:
            path = self.directory / f"audit-{self.head.number + 1:012}.jsonl"
            said = [*self._removal(path), *said]
        head, lines = self.head, b""
        for each in said:
            head, line = _chained(head, each, at_s)
            lines += line
        _append_lines(path, lines)
        self._path, self.head = path, head
        for old in segments_of(self.directory)[: -self._segments]:
            old.unlink()
        return self.head

    def _removal(self, begun: Path) -> list[dict[str, Any]]:
        """What is to be recorded of the segments that go when one more is begun; nothing if none goes."""
        before = [path for path in segments_of(self.directory) if path != begun]
        if len(before) < self._segments:
            return []
        first = before[1 - self._segments]
        with first.open("rb") as file:
            try:
                record = _parsed(file.readline(), str(first))
            except CorruptError:
                return []  # Whoever checks the log is told of the damage, and that nothing says where it begins.
        return [{**_REMOVAL, "first": {"number": record["number"], "hash": record["hash"]}}]

    def _recovered(self) -> tuple[Path | None, Head]:
        """The last segment, without a record that was cut short: nobody was told that it was there."""
        segments = segments_of(self.directory)
        while segments:
            path = segments.pop()
            content = path.read_bytes()
            whole = _whole_lines(content)
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            if whole:
                return path, _head_in(whole, path)
            path.unlink()
        return None, Head()


def newest_head(directory: Path) -> Head:
    """The head of a log that somebody else may be writing.

    Raises:
        OSError: it cannot be read.
        CorruptError: its last line is no record.
    """
    for path in reversed(segments_of(directory)):
        if whole := _whole_lines(path.read_bytes()):
            return _head_in(whole, path)
    return Head()


def read_log(directory: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a log, oldest first.

    Raises:
        CorruptError: a line is no record.
    """
    for path in segments_of(directory):
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield _parsed(line, str(path))


def segments_of(directory: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(directory.glob(_SEGMENT))


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256 over the hash before and everything the record says."""
    said = {key: value for key, value in record.items() if key not in ("hash", "previous")}
    body = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(str(record.get("previous")).encode() + b"\n" + body).hexdigest()


def _chained(before: Head, said: Mapping[str, Any], at_s: float) -> tuple[Head, bytes]:
    """The record that says so, as the next head and a line of the log."""
    at = dt.datetime.fromtimestamp(at_s, dt.UTC).isoformat(timespec="milliseconds")
    record = {"number": before.number + 1, "at": at, **said, "previous": before.hash}
    record["hash"] = digest_of(record)
    return Head(record["number"], record["hash"]), json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record["number"], int) or not isinstance(record["hash"], str) or "previous" not in record:
            raise TypeError("no number, hash or previous hash")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{where}: a line is no audit record ({error})") from None
    return dict(record)


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _head_in(lines: bytes, path: Path) -> Head:
    record = _parsed(lines.splitlines()[-1], str(path))
    return Head(record["number"], record["hash"])


def _append_lines(path: Path, lines: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, lines)
            if written != len(lines):
                raise OSError(f"{written} of {len(lines)} bytes written")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if not size:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
