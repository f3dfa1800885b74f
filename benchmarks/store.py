"""Results that are measured part by part: an entry measured again replaces the old one, the rest stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import load_average

Entry = Mapping[str, Any]


class PartialResults:
    """A file of entries, each with the machine and the time it was measured with.

    Args:
        path: Of the file; it need not exist.
        key: Fields that tell one entry from another.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self._path = path
        self._key = tuple(key)

    def read(self) -> list[Entry]:
        """All entries, in the order in which they first came."""
        if not self._path.exists():
            return []
        entries: list[Entry] = json.loads(self._path.read_text())["results"]
        return entries

    def put(self, entry: Entry, machine: Entry) -> None:
        """Add an entry, or replace the one with the same key."""
        after = load_average()
        complete = {**entry, "machine": {**machine, "load_average_after": after}}
        entries = {self._key_of(each): each for each in self.read()}
        entries[self._key_of(complete)] = complete
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = {"kind": self._path.stem, "results": list(entries.values())}
        self._path.write_text(json.dumps(document, indent=1) + "\n")

    def _key_of(self, entry: Entry) -> tuple[str, ...]:
        return tuple(str(entry[name]) for name in self._key)
