"""A shard of a data set on its way in: what has come of it, and what that was, in two files.

`<sha256>.sealed` holds the sealed chunks as they came and nothing else, so that it becomes the shard's blob as it is.
`<sha256>.journal` holds records: the header, and then for each chunk the SHA-256 of everything up to its end. No key to
a shard is here, so that is how another process knows which chunks are as they came: it reads them again, and cuts off
the first one that is torn or changed, and all after it. `<sha256>` is the digest of the whole shard, by its header.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from threading import Lock

from cortex_common.errors import CorruptError
from cortex_common.security.objects import ObjectHeader
from cortex_common.security.shards import sealed_bytes, sealed_size
from cortex_common.storage.durable import directory_syncer, reporting_full, reporting_unreadable, sync_together
from cortex_common.storage.growing import GrowingFile
from cortex_common.storage.records import read_record, record
from cortex_common.transfer import TrailerFrame
from cortex_common.transfer.content import chunk_digest, content_digest

SEALED, JOURNAL = ".sealed", ".journal"


class ShardSpool:
    """One shard. Not for two threads at a time, except `prove`, `chunks` and `size_bytes`.

    Attributes:
        header: The shard's.
        path: Of its sealed chunks.
    """

    def __init__(self, folder: Path, header: ObjectHeader) -> None:
        self.header = header
        self.path = folder / f"{header.model_sha256}{SEALED}"
        self._journal_path = self.path.with_suffix(JOURNAL)
        self._proving = Lock()
        self._is_proven = False
        self._tags: list[bytes] = []
        self._digest = hashlib.sha256()
        self._journal_bytes = 0
        self._files: _Files | None = None

    @classmethod
    def start(cls, folder: Path, header: ObjectHeader) -> ShardSpool:
        """Begin a shard; durable.

        Raises:
            OverloadedError: the disk is full; nothing is begun.
        """
        spool = cls(folder, header)
        try:
            files = spool._files = _Files(spool.path, spool._journal_path)
            files.journal.append(record(json.dumps(header.to_facts()).encode()))
            files.sync(folder)
        except BaseException:
            spool.erase()
            raise
        spool._is_proven, spool._journal_bytes = True, files.journal.end
        return spool

    @classmethod
    def load(cls, folder: Path, sha256: str) -> ShardSpool:
        """What an earlier process left; nothing of it counts before `prove`.

        Raises:
            CorruptError: its header cannot be read, or is another shard's, or there are no chunks.
        """
        path = folder / f"{sha256}{JOURNAL}"
        with reporting_unreadable(path), path.open("rb", buffering=0) as file:
            first = read_record(file.fileno())
        try:
            header = ObjectHeader.from_facts(json.loads(first[0] if first else b""))
        except (ValueError, TypeError) as error:
            raise CorruptError(f"{path} is not readable: {error}") from None
        if header.model_sha256 != sha256:
            raise CorruptError(f"{path} is not readable: it tells of shard {header.model_sha256}")
        spool = cls(folder, header)
        if not spool.path.is_file():
            raise CorruptError(f"{spool.path} is gone")
        return spool

    @property
    def chunks(self) -> int:
        """Chunks held: where an upload goes on."""
        return len(self._tags)

    @property
    def size_bytes(self) -> int:
        """Their sealed bytes."""
        return sealed_bytes(self.header, self.chunks)

    @property
    def changed_s(self) -> float:
        """When something came last, in seconds since 1970-01-01 UTC; 0.0 if its files are gone."""
        try:
            return max(path.stat().st_mtime for path in (self.path, self._journal_path))
        except FileNotFoundError:
            return 0.0

    @property
    def is_complete(self) -> bool:
        """All chunks are here."""
        return self.chunks == self.header.chunks

    @property
    def is_spoilt(self) -> bool:
        """All chunks are here, and are not the shard's: one that was wrong came among them."""
        return self.is_complete and self._digest.hexdigest() != self.header.model_sha256

    @property
    def what(self) -> str:
        """For errors."""
        return f"shard {self.header.round} of data set {self.header.job_id}"

    def prove(self) -> None:
        """Find out what is held, once a process: all of it is read, and what is not as it came is cut off."""
        with self._proving:
            if not self._is_proven:
                self._replay()
                self._is_proven = True

    def append(self, sealed: bytes | memoryview) -> None:
        """Add the next chunk.

        Raises:
            OverloadedError: the disk is full.
        """
        files = self._opened()
        after = self._digest.copy()
        after.update(sealed)
        try:
            is_synced = files.chunks.append(sealed)
            files.journal.append(record(after.digest()))
            if is_synced:
                files.sync()
        except BaseException:
            # How far both have come shows when they are read again.
            self._close()
            self._is_proven = False
            raise
        self._digest, self._journal_bytes = after, files.journal.end
        self._tags.append(chunk_digest(sealed))

    def finish(self, trailer: TrailerFrame) -> bytes:
        """Check the whole against its header and the trailer; gives the content's digest.

        Raises:
            CorruptError: it is not what they say.
        """
        if self.is_spoilt:
            raise CorruptError(f"{self.what}: its chunks are not those of {self.header.model_sha256}")
        content = content_digest(self._tags)
        if not self.is_complete or (trailer.chunks, trailer.content_sha256) != (self.chunks, content):
            raise CorruptError(f"{self.what}: its chunks are not those its trailer tells of")
        return content

    def close(self) -> None:
        """Make what is held durable, and give the files up; again does no harm. OverloadedError: the disk is full."""
        try:
            if self._files is not None:
                self._files.sync()
        finally:
            self._close()

    def erase(self) -> None:
        """Remove everything. Not synced: what a power cut brings back is removed when it is old."""
        self._close()
        for path in (self._journal_path, self.path):
            path.unlink(missing_ok=True)

    def _opened(self) -> _Files:
        if self._files is None:
            self._files = _Files(self.path, self._journal_path, (self.size_bytes, self._journal_bytes))
        return self._files

    def _close(self) -> None:
        if self._files is not None:
            self._files.close()
            self._files = None

    def _replay(self) -> None:
        """Take what both files agree on."""
        self._tags, self._digest = [], hashlib.sha256()
        try:
            files = _Files(self.path, self._journal_path, (0, 0))
        except FileNotFoundError:
            return  # it has been dropped
        with closing(files):
            header = read_record(files.journal.descriptor)
            files.journal.end = header[1] if header else 0
            while not self.is_complete and (end := self._replay_chunk(files)):
                files.journal.end = end
            files.chunks.cut(self.size_bytes)
            files.journal.cut(files.journal.end)
            self._journal_bytes = files.journal.end

    def _replay_chunk(self, files: _Files) -> int:
        """Take the next chunk, if it is as it came; where its record ends, or 0."""
        told = read_record(files.journal.descriptor, files.journal.end)
        try:
            sealed = files.chunks.read(self.size_bytes, sealed_size(self.header, self.chunks))
        except CorruptError:
            return 0
        after = self._digest.copy()
        after.update(sealed)
        if told is None or told[0] != after.digest():
            return 0
        self._digest = after
        self._tags.append(chunk_digest(sealed))
        return told[1]


class _Files:
    """The two files of a shard, open; empty ones unless it is told how much of them counts."""

    def __init__(self, chunks: Path, journal: Path, ends: tuple[int, int] | None = None) -> None:
        self._folder = chunks.parent
        is_new = ends is None
        begin, begin_journal = ends or (0, 0)
        self.chunks = GrowingFile(chunks, new=is_new, end=begin)
        try:
            self.journal = GrowingFile(journal, new=is_new, end=begin_journal)
        except BaseException:
            self.chunks.close()
            raise

    def sync(self, *folders: Path) -> None:
        """Make both durable, and names in folders. OverloadedError: the disk is full."""
        with reporting_full(self._folder, 0):
            sync_together(self.chunks.syncer, self.journal.syncer, *map(directory_syncer, folders))

    def close(self) -> None:
        """Give both up."""
        self.chunks.close()
        self.journal.close()
