"""Updates on their way in: one file for a seat's header, its sealed chunks and at last its receipt.

`seat-<n>.update` begins with the header as a record; length-prefixed sealed chunks follow; the update is accepted once
its receipt, the last record, is durable. A killed process leaves at most a torn end, which is cut off when the spool
is opened again. Chunks of an update without a receipt are unproven then: a power cut may have left anything of them.

The receipt must not outlive a chunk. The chunks of a large update are synced before it is written; a small one is
synced in one go, and its receipt carries a digest of everything before it, checked when it is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError
from cortex_common.ids import SeatIndex
from cortex_common.security.encryption import TAG_BYTES, ObjectHeader
from cortex_common.storage.durable import (
    directory_syncer,
    reporting_full,
    reporting_unreadable,
    sync_directory,
    sync_together,
)
from cortex_common.storage.growing import GrowingFile
from cortex_common.storage.records import read_record, record
from cortex_common.transfer import Receipt
from cortex_common.transfer.content import chunk_digest

_PREFIX_BYTES = 4
_SMALL_BYTES = 1 << 20
_FILE_NAME = re.compile(r"seat-(\d+)\.update")


class SeatSpool:
    """One seat's update. Not for two threads at a time, except `read`."""

    def __init__(self, directory: Path, header: ObjectHeader, file: GrowingFile) -> None:
        self.header = header
        self.digests: list[bytes] = []
        self.unproven = 0
        """So many chunks have been read back from the disk, and opened by nobody since."""
        self._directory = directory
        self._path = update_path(directory, header.seat)
        self._offsets = [file.end]
        self._file = file

    @classmethod
    def start(cls, directory: Path, header: ObjectHeader) -> SeatSpool:
        """Begin an update.

        Raises:
            OverloadedError: the disk is full.
        """
        path = update_path(directory, header.seat)
        file = GrowingFile(path, new=True)
        try:
            file.append(record(_to_json(header.to_facts())))
        except BaseException:
            file.close()
            path.unlink()
            raise
        return cls(directory, header, file)

    @classmethod
    def load(cls, directory: Path, seat: SeatIndex) -> tuple[SeatSpool, Receipt | None]:
        """Open what an earlier process left: whole chunks are kept, a torn one is cut off.

        Raises:
            CorruptError: there is no header, or not what the receipt was given for.
        """
        path = update_path(directory, seat)
        file = GrowingFile(path)
        try:
            with reporting_unreadable(path):
                first = read_record(file.descriptor)
                if first is None:
                    raise CorruptError(f"{path} is not readable: no header")
                file.end = first[1]
                spool = cls(directory, ObjectHeader.from_facts(_from_json(path, first[0])), file)
                spool._index()
                receipt = spool._read_receipt()
        except BaseException:
            file.close()
            raise
        if receipt is None:
            spool.unproven = spool.chunks
            file.cut(spool._offsets[-1])
        return spool, receipt

    @property
    def chunks(self) -> int:
        """Whole chunks held: where an upload goes on."""
        return len(self._offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Sealed bytes held, without the length prefixes."""
        return self._offsets[-1] - self._offsets[0] - _PREFIX_BYTES * self.chunks

    def append(self, sealed: bytes | memoryview) -> None:
        """Add the next chunk.

        Raises:
            OverloadedError: the disk is full; the chunk is not there.
        """
        self._file.append(len(sealed).to_bytes(_PREFIX_BYTES, "big"), sealed)
        self.digests.append(chunk_digest(sealed))
        self._offsets.append(self._file.end)

    def keep(self, chunks: int) -> None:
        """Give up all chunks but the first ones; what is left is proven."""
        del self.digests[chunks:], self._offsets[chunks + 1 :]
        self._file.cut(self._offsets[-1])
        self.unproven = 0

    def commit(self, receipt: Receipt) -> None:
        """Make the update and its receipt durable: the moment of acceptance.

        Raises:
            OverloadedError: the disk is full; the update is not accepted.
        """
        end = self._offsets[-1]
        facts = asdict(receipt)
        if end <= _SMALL_BYTES:
            facts["whole"] = self._digest()
        else:
            self._sync()
        self._file.append(record(_to_json(facts)))
        try:
            self._sync()
        except BaseException:
            self._file.cut(end)
            raise

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`; threads may call this at the same time."""
        start, end = self._offsets[index] + _PREFIX_BYTES, self._offsets[index + 1]
        sealed = self._file.read(start, end - start)
        if len(sealed) != end - start:
            raise CorruptError(f"{self._path}: chunk {index} is cut short")
        return sealed

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def erase(self) -> None:
        """Remove everything of this update."""
        self.close()
        remove_seat(self._directory, self.header.seat)

    def _sync(self) -> None:
        """The file and its name."""
        with reporting_full(self._directory, self.size_bytes):
            sync_together(self._file.syncer, directory_syncer(self._directory))

    def _digest(self) -> str:
        """SHA-256 of the header and all chunks, for small updates."""
        return hashlib.sha256(self._file.read(0, self._offsets[-1])).hexdigest()

    def _index(self) -> None:
        """Find the whole chunks."""
        end = os.fstat(self._file.descriptor).st_size
        while self.chunks < self.header.chunks:
            start = self._offsets[-1] + _PREFIX_BYTES
            prefix = self._file.read(self._offsets[-1], _PREFIX_BYTES)
            stop = start + int.from_bytes(prefix, "big")
            if len(prefix) < _PREFIX_BYTES or stop < start + TAG_BYTES or stop > end:
                break
            self._offsets.append(stop)
            self.digests.append(self._file.read(stop - TAG_BYTES, TAG_BYTES))
        self._file.end = self._offsets[-1]

    def _read_receipt(self) -> Receipt | None:
        """The receipt after the last chunk, if the update was accepted."""
        last = read_record(self._file.descriptor, self._offsets[-1]) if self.chunks == self.header.chunks else None
        if last is None:
            return None
        facts = _from_json(self._path, last[0])
        whole = facts.pop("whole", None)
        if whole is not None and whole != self._digest():
            raise CorruptError(f"{self._path}: its chunks are not those it was accepted with")
        try:
            return Receipt(**facts)
        except TypeError as error:
            raise CorruptError(f"{self._path} is not readable: {error}") from error


def update_path(directory: Path, seat: SeatIndex) -> Path:
    """Where a seat's update lies."""
    return directory / f"seat-{seat}.update"


def remove_seat(directory: Path, seat: SeatIndex) -> None:
    """Remove a seat's update."""
    update_path(directory, seat).unlink(missing_ok=True)
    sync_directory(directory)


def spooled_seats(directory: Path) -> Iterator[SeatIndex]:
    """Seats that have an update in a round's folder."""
    for path in sorted(directory.glob("seat-*.update")):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            yield SeatIndex(int(match[1]))


def _to_json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, separators=(",", ":")).encode()


def _from_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{path} is not readable: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptError(f"{path} is not readable: no JSON object")
    return facts
