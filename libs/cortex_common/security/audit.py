"""The audit log: an append-only file of records, each bound to the one before it by a hash, its head signed.

Changing, removing or inserting a record breaks the chain; cutting records off the end contradicts a signed head taken
before. Old segments are removed when the log is full: the chain then begins at a later record.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError

_START = "0" * 64
_SEGMENT = "audit-*.jsonl"


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
    hash: str = _START


@dataclass(slots=True)
class Checked:
    """What a check of a log found.

    Attributes:
        first, last: Numbers of the records that are there.
        problems: What is wrong, a sentence each.
    """

    first: int = 0
    last: int = 0
    problems: list[str] = field(default_factory=list)


class AuditLog:
    """Appends to a log; one writer a directory. Not for several threads at once.

    Args:
        directory: Of the segments.
        segment_bytes: A new file is begun beyond this size.
        segments: The oldest files beyond this number are removed.
    """

    def __init__(self, directory: Path, segment_bytes: int = 4 << 20, segments: int = 16) -> None:
        self.directory = directory
        self._segment_bytes = segment_bytes
        self._segments = segments
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path, self.head = self._recovered()

    def append(self, entry: Entry, at_s: float) -> Head:
        """Add a record; it is on the disk when this returns.

        Raises:
            OSError: it is not, and the log is as before.
        """
        number = self.head.number + 1
        record = {
            "number": number,
            "at": dt.datetime.fromtimestamp(at_s, dt.UTC).isoformat(timespec="milliseconds"),
            **{name: value for name in Entry.__slots__ if (value := getattr(entry, name))},
            "previous": self.head.hash,
        }
        record["hash"] = _digest(record)
        if self._path is None or self._path.stat().st_size >= self._segment_bytes:
            self._path = self.directory / f"audit-{number:012}.jsonl"
        _append_line(self._path, json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self.head = Head(number, record["hash"])
        for old in sorted(self.directory.glob(_SEGMENT))[: -self._segments]:
            old.unlink()
        return self.head

    def _recovered(self) -> tuple[Path | None, Head]:
        """The last segment, without a record that was cut short: nobody was told that it was there."""
        segments = sorted(self.directory.glob(_SEGMENT))
        while segments:
            path = segments.pop()
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            if whole:
                record = _parsed(whole.splitlines()[-1], str(path))
                return path, Head(record["number"], record["hash"])
            path.unlink()
        return None, Head()


def read_log(directory: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a log, oldest first.

    Raises:
        CorruptError: a line is no record.
    """
    for path in sorted(directory.glob(_SEGMENT)):
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield _parsed(line, str(path))


def check_log(directory: Path, known: Mapping[int, str] | None = None) -> Checked:
    """Check the chain of a log.

    Args:
        directory: Of the log.
        known: Hashes of records by number, from heads that were signed earlier.
    """
    found, before = Checked(), Head()
    hashes = dict(known or {})
    try:
        for record in read_log(directory):
            number = record["number"]
            found.first = found.first or number
            if before.number and (number != before.number + 1 or record["previous"] != before.hash):
                found.problems.append(f"record {number} does not follow record {before.number}")
            if record["hash"] != _digest(record):
                found.problems.append(f"record {number} was changed")
            if hashes.pop(number, record["hash"]) != record["hash"]:
                found.problems.append(f"record {number} is not the one whose hash was signed")
            before = Head(number, record["hash"])
    except CorruptError as error:
        found.problems.append(error.message)
    found.last = before.number
    missing = [number for number in hashes if number > found.last]
    found.problems += [f"record {number} was signed and is gone" for number in sorted(missing)]
    return found


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 over the hash before and everything the record says."""
    said = {key: value for key, value in record.items() if key not in ("hash", "previous")}
    body = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(str(record.get("previous")).encode() + b"\n" + body).hexdigest()


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record["number"], int) or not isinstance(record["hash"], str) or "previous" not in record:
            raise TypeError("no number, hash or previous hash")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{where}: a line is no audit record ({error})") from None
    return dict(record)


def _append_line(path: Path, line: bytes) -> None:
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes written")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
