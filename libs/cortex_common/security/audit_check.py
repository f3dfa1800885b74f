"""Whether an audit log hangs together: each record follows the one before, and nothing that was signed is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError
from cortex_common.security.audit import SEGMENT_BYTES, SEGMENTS, START, Head, digest_of, read_log, segments_of


@dataclass(slots=True)
class Checked:
    """What a check of a log found.

    Attributes:
        first, last: Numbers of the records that are there.
        removed_by: Number of the record that says that those before the first were removed; 0 if there is none.
        unsigned_at: When the first record was written that no signed head covers; empty if there is none.
        problems: What is wrong, a sentence each.
        unproven: What can neither be shown nor disproved, a sentence each.
    """

    first: int = 0
    last: int = 0
    removed_by: int = 0
    unsigned_at: str = ""
    problems: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


def check_log(
    directory: Path,
    known: Mapping[int, str] | None = None,
    see: Callable[[Mapping[str, Any]], None] | None = None,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    segments: int = SEGMENTS,
) -> Checked:
    """Check the chain of a log.

    Args:
        directory: Of the log.
        known: Hashes of records by number, from heads that were signed earlier.
        see: Called with each record.
        segment_bytes: As the log was written with.
        segments: As the log was written with.
    """
    chain = _Chain(known or {})
    found = chain.found
    try:
        for record in read_log(directory):
            chain.add(record)
            if see is not None:
                see(record)
    except CorruptError as error:
        found.problems.append(error.message)
    if found.first > 1 and not found.removed_by:
        gone = f"the records before {found.first} are gone"
        # Versions before there were such records removed some only of a log that was full.
        if not chain.says_removed and _is_full(directory, segment_bytes, segments):
            found.unproven.append(f"{gone}; an earlier version, which recorded no removal, may have removed them")
        else:
            found.problems.append(f"{gone}, and no record says that the service removed them")
    missing = [number for number in known or {} if number > found.last]
    found.problems += [f"record {number} was signed and is gone" for number in sorted(missing)]
    return found


class _Chain:
    """The records of a log as they are read."""

    def __init__(self, known: Mapping[int, str]) -> None:
        self.found = Checked()
        self.says_removed = False
        self._known = {0: START, **known}
        self._newest_known = max(self._known)
        self._first = self._before = Head()

    def add(self, record: Mapping[str, Any]) -> None:
        """Check one more record."""
        found, number = self.found, record["number"]
        this, previous = Head(number, record["hash"]), record["previous"]
        if not found.last:
            found.first, self._first = number, this
            self._before = Head(number - 1, self._known.get(number - 1, previous))
        if number < 1 or (number, previous) != (self._before.number + 1, self._before.hash):
            found.problems.append(f"record {number} does not follow record {self._before.number}")
        if this.hash != digest_of(record):
            found.problems.append(f"record {number} was changed")
        if self._known.get(number, this.hash) != this.hash:
            found.problems.append(f"record {number} is not the one whose hash was signed")
        if number > self._newest_known and not found.unsigned_at:
            found.unsigned_at = str(record.get("at"))
        if "first" in record:
            self.says_removed = True
            if record["first"] == {"number": self._first.number, "hash": self._first.hash}:
                found.removed_by = number
        self._before, found.last = this, number


def _is_full(directory: Path, segment_bytes: int, segments: int) -> bool:
    """Whether a log is as long as it may be."""
    paths = segments_of(directory)
    return len(paths) >= segments and all(path.stat().st_size >= segment_bytes for path in paths[:-1])
