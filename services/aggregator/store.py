"""What an aggregator keeps about rounds and fences, on disk.

spool/<job>/<round>-<attempt>/round.log and the seats' files; fences/<job>. No data key is ever written. A round.log
holds the round's states as records, the last one counts: a change costs one sync. Older states of both that are put
back are refused (`security.marks`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.logging import get_logger
from cortex_common.security.marks import HighWaterMarks, MarkedFile
from cortex_common.storage.checked import from_checked_json
from cortex_common.storage.durable import (
    directory_syncer,
    file_syncer,
    make_directory,
    reporting_full,
    reporting_unreadable,
    set_aside,
    sync_directory,
    sync_together,
    write_fully,
)
from cortex_common.storage.records import last_record, record
from services.aggregator.domain import Phase, RoundKey, RoundTerms, Upstream
from services.aggregator.spool import spooled_seats

log = get_logger(__name__)

_LOG = "round.log"
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

    def erase_job(self, job_id: JobId) -> None:
        """Forget, durably, all rounds of a job and their spool."""

    def load(self) -> Iterator[StoredRound]:
        """Every round kept."""

    def directory(self, key: RoundKey) -> Path:
        """Where the round's seats are spooled."""

    def fence(self, job_id: JobId) -> int:
        """The highest fence seen for a job; 0 at first."""

    def raise_fence(self, job_id: JobId, fence: int) -> None:
        """Remember a higher fence, durably."""

    def forget_fence(self, job_id: JobId) -> None:
        """Nothing of a job is left to protect."""

    def spool_bytes(self) -> int:
        """Bytes in the spool."""


class DirectoryRoundStore:
    """RoundStore in a folder."""

    def __init__(self, root: Path) -> None:
        self.spool = root / "spool"
        self._fences = root / "fences"
        for directory in (self.spool, self._fences):
            make_directory(directory)
        self._marks = HighWaterMarks(root)
        self._seen: dict[JobId, int] = {}

    def save(self, stored: StoredRound) -> None:
        """Append to round.log and sync once; then raise its mark."""
        directory = self.directory(stored.terms.key)
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        plain = {"phase": stored.phase.value, "reason": stored.reason, "terms": _terms_to_facts(stored.terms)}
        facts, version = self._marks.stamped(_name(directory), plain)
        data = record(json.dumps(facts, separators=(",", ":")).encode())
        path = directory / _LOG
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _append(file, path, data)
        finally:
            os.close(file)
        self._marks.raise_to(_name(directory), version)

    def erase(self, key: RoundKey) -> None:
        """Remove the round's folder. Not synced: nobody is told, and what a power cut brings back is retired again."""
        directory = self.directory(key)
        self._marks.forget(_name(directory))
        with suppress(OSError):
            # The record goes last: updates without one, which a kill would leave, would be taken for a damaged round.
            for path in sorted(directory.iterdir(), key=lambda path: path.name == _LOG):
                path.unlink()
            directory.rmdir()

    def erase_job(self, job_id: JobId) -> None:
        """Remove the job's folder, also what was set aside."""
        directory = self.spool / job_id
        if directory.exists():
            for each in directory.iterdir():
                self._marks.forget(_name(each))
            shutil.rmtree(directory, ignore_errors=True)
            sync_directory(self.spool)

    def load(self) -> Iterator[StoredRound]:
        """The last of each round.log; what was never opened, and empty folders, are removed.

        A round that cannot be read, or whose state is an older one, is set aside with its updates.
        """
        for directory in sorted(self.spool.glob("*/*")):
            if not _ROUND_FOLDER.fullmatch(directory.name):
                continue
            try:
                stored = _load_round(directory, self._marks)
            except CorruptError as error:
                log.error("damaged_round_set_aside", path=str(set_aside(directory)), reason=error.message)
                self._marks.forget(_name(directory))
                continue
            if stored is None:
                shutil.rmtree(directory, ignore_errors=True)
            else:
                yield stored
        for job in self.spool.iterdir():
            with suppress(OSError):
                job.rmdir()

    def directory(self, key: RoundKey) -> Path:
        """spool/<job>/<round>-<attempt>."""
        return self.spool / key.job_id / _folder(key)

    def fence(self, job_id: JobId) -> int:
        """Read once, then from memory."""
        if job_id not in self._seen:
            kept = self._fence(job_id)
            try:
                facts = kept.read(_fence_facts)
                self._seen[job_id] = int(facts["fence"]) if facts else 0
            except (CorruptError, ValueError, KeyError, TypeError) as error:
                raise CorruptError(f"{kept.path} is not readable: {error}") from error
        return self._seen[job_id]

    def raise_fence(self, job_id: JobId, fence: int) -> None:
        """Write it in one step."""
        if fence > self.fence(job_id):
            self._fence(job_id).write({"fence": fence})
            self._seen[job_id] = fence

    def forget_fence(self, job_id: JobId) -> None:
        """Remove its file. Not synced: an old fence that a power cut brings back is harmless."""
        self._fence(job_id).remove()
        self._seen.pop(job_id, None)

    def _fence(self, job_id: JobId) -> MarkedFile:
        return MarkedFile(self._fences / job_id, self._marks, f"fences/{job_id}")

    def spool_bytes(self) -> int:
        """Sum of all files' lengths."""
        return sum(path.stat().st_size for path in self.spool.rglob("seat-*.update"))


def _fence_facts(data: bytes) -> dict[str, Any]:
    """A fence as it was written; by versions before, as a bare number."""
    return {"fence": int(data)} if data.isdigit() else from_checked_json(data)


def _name(directory: Path) -> str:
    """What a round's log is called among the marks."""
    return f"spool/{directory.parent.name}/{directory.name}"


def _folder(key: RoundKey) -> str:
    return f"{key.round}-{key.attempt}"


def _terms_to_facts(terms: RoundTerms) -> dict[str, Any]:
    facts = asdict(terms)
    facts["seats"] = [[seat, worker] for seat, worker in sorted(terms.seats.items())]
    return facts


def _append(file: int, path: Path, data: bytes) -> None:
    """Add a record after the last whole one; the first one makes the folder's name durable too."""
    _, end = last_record(file)
    try:
        with reporting_full(path.parent, len(data)):
            os.ftruncate(file, end)
            os.lseek(file, end, os.SEEK_SET)
            write_fully(file, data)
            folders = () if end else (path.parent, path.parent.parent)
            sync_together(file_syncer(file, path), *map(directory_syncer, folders))
    except BaseException:
        os.ftruncate(file, end)
        raise


def _last_of(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return last_record(file)[0]
    finally:
        os.close(file)


def _load_round(directory: Path, marks: HighWaterMarks) -> StoredRound | None:
    """A round as it was last stored; None if its opening was never answered: not even the first record is whole."""
    path = directory / _LOG
    with reporting_unreadable(path):
        data = _last_of(path) if path.exists() else b""
    if data:
        stored = _read_round(path, data, marks)
        if (stored.terms.key.job_id, _folder(stored.terms.key)) != (directory.parent.name, directory.name):
            raise CorruptError(f"{path} is not readable: it describes {stored.terms.key}")
        return stored
    _require_unanswered(path, marks)
    if next(spooled_seats(directory), None) is not None:
        raise CorruptError(f"{path} is not readable: there are updates, but no record")
    return None


def _require_unanswered(path: Path, marks: HighWaterMarks) -> None:
    try:
        marks.require_unknown(_name(path.parent))
    except CorruptError as error:
        raise CorruptError(f"{path} is not readable: {error.message}") from None


def _read_round(path: Path, data: bytes, marks: HighWaterMarks) -> StoredRound:
    try:
        facts = json.loads(data)
        marks.check(_name(path.parent), facts)
        raw = facts["terms"]
        key = RoundKey(JobId(raw["key"]["job_id"]), RoundNumber(raw["key"]["round"]), raw["key"]["attempt"])
        seats = {SeatIndex(seat): NodeName(worker) for seat, worker in raw["seats"]}
        upstream = Upstream(**raw["upstream"]) if raw.get("upstream") else None
        readers = tuple(NodeName(name) for name in raw.get("readers", ()))
        terms = RoundTerms(**{**raw, "key": key, "seats": seats, "upstream": upstream, "readers": readers})
        return StoredRound(terms, Phase(facts["phase"]), facts["reason"])
    except CorruptError as error:
        raise CorruptError(f"{path} is not readable: {error.message}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is not readable: {error!r}") from error
