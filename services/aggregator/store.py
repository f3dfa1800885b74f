"""What an aggregator keeps about rounds and fences, on disk.

spool/<job>/<round>-<attempt>/round.json and the seats' files; fences/<job>. No data key is ever written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.storage.durable import make_directory, sync_directory, write_durably
from services.aggregator.domain import Phase, RoundKey, RoundTerms, Upstream

_ROUND_FOLDER = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class StoredRound:
    """A round as it was last decided."""

    terms: RoundTerms
    phase: Phase
    reason: str = ""


class RoundStore(Protocol):
    """Rounds and fences that survive a restart."""

    def save(self, stored: StoredRound) -> None:
        """Make a round's state durable."""

    def erase(self, key: RoundKey) -> None:
        """Forget a round and its spool."""

    def load(self) -> Iterator[StoredRound]:
        """Every round kept."""

    def directory(self, key: RoundKey) -> Path:
        """Where the round's seats are spooled."""

    def fence(self, job_id: JobId) -> int:
        """The highest fence seen for a job; 0 at first."""

    def raise_fence(self, job_id: JobId, fence: int) -> None:
        """Remember a higher fence, durably."""

    def spool_bytes(self) -> int:
        """Bytes in the spool."""


class DirectoryRoundStore:
    """RoundStore in a folder."""

    def __init__(self, root: Path) -> None:
        self.spool = root / "spool"
        self._fences = root / "fences"
        for directory in (self.spool, self._fences):
            make_directory(directory)
        self._seen: dict[JobId, int] = {}

    def save(self, stored: StoredRound) -> None:
        """Write round.json in one step."""
        directory = self.directory(stored.terms.key)
        make_directory(directory)
        facts = {"phase": stored.phase.value, "reason": stored.reason, "terms": _terms_to_facts(stored.terms)}
        write_durably(directory / "round.json", json.dumps(facts, separators=(",", ":")).encode())

    def erase(self, key: RoundKey) -> None:
        """Remove the round's folder."""
        directory = self.directory(key)
        if directory.is_dir():
            shutil.rmtree(directory, ignore_errors=True)
            sync_directory(directory.parent)

    def load(self) -> Iterator[StoredRound]:
        """Read every round.json; what was never opened, and empty folders, are removed."""
        for directory in sorted(self.spool.glob("*/*")):
            if not _ROUND_FOLDER.fullmatch(directory.name):
                continue
            path = directory / "round.json"
            if not path.exists():
                shutil.rmtree(directory, ignore_errors=True)
                continue
            yield _read_round(path)
        for job in self.spool.iterdir():
            with suppress(OSError):
                job.rmdir()

    def directory(self, key: RoundKey) -> Path:
        """spool/<job>/<round>-<attempt>."""
        return self.spool / key.job_id / f"{key.round}-{key.attempt}"

    def fence(self, job_id: JobId) -> int:
        """Read once, then from memory."""
        if job_id not in self._seen:
            path = self._fences / job_id
            try:
                self._seen[job_id] = int(path.read_text()) if path.exists() else 0
            except ValueError as error:
                raise CorruptError(f"{path} is not readable: {error}") from error
        return self._seen[job_id]

    def raise_fence(self, job_id: JobId, fence: int) -> None:
        """Write it in one step."""
        if fence > self.fence(job_id):
            write_durably(self._fences / job_id, str(fence).encode())
            self._seen[job_id] = fence

    def spool_bytes(self) -> int:
        """Sum of all files' lengths."""
        return sum(path.stat().st_size for path in self.spool.rglob("seat-*.chunks"))


def _terms_to_facts(terms: RoundTerms) -> dict[str, Any]:
    facts = asdict(terms)
    facts["seats"] = [[seat, worker] for seat, worker in sorted(terms.seats.items())]
    return facts


def _read_round(path: Path) -> StoredRound:
    try:
        facts = json.loads(path.read_bytes())
        raw = facts["terms"]
        key = RoundKey(JobId(raw["key"]["job_id"]), RoundNumber(raw["key"]["round"]), raw["key"]["attempt"])
        seats = {SeatIndex(seat): NodeName(worker) for seat, worker in raw["seats"]}
        upstream = Upstream(**raw["upstream"]) if raw.get("upstream") else None
        terms = RoundTerms(**{**raw, "key": key, "seats": seats, "upstream": upstream})
        return StoredRound(terms, Phase(facts["phase"]), facts["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} is not readable: {error}") from error
