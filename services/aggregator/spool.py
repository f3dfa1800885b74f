"""Updates on their way in: sealed chunks on disk, one seat in three files.

`seat-<n>.header` is durable before the first chunk; `seat-<n>.chunks` holds length-prefixed sealed chunks; the update
is accepted once `seat-<n>.receipt` is durable, which is written after the chunks have been synced. A killed process
leaves at most a torn last chunk, which is cut off when the spool is opened again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cortex_common.errors import CorruptError
from cortex_common.ids import SeatIndex
from cortex_common.security.encryption import ObjectHeader
from cortex_common.storage.durable import reporting_full, sync_directory, sync_file, write_durably, write_fully
from cortex_common.transfer import Receipt
from cortex_common.transfer.content import chunk_digest

_PREFIX_BYTES = 4
_SYNC_EVERY_BYTES = 16 << 20
_HEADER_NAME = re.compile(r"seat-(\d+)\.header")


class SeatSpool:
    """One seat's update. Not for two threads at a time, except `read`."""

    def __init__(self, directory: Path, header: ObjectHeader) -> None:
        self.header = header
        self.digests: list[bytes] = []
        self._directory = directory
        self._base = directory / f"seat-{header.seat}"
        self._offsets = [0]
        self._file = os.open(self._path("chunks"), os.O_RDWR | os.O_CREAT, 0o600)

    @classmethod
    def start(cls, directory: Path, header: ObjectHeader) -> SeatSpool:
        """Begin an update: afterwards its header is durable.

        Raises:
            OverloadedError: the disk is full.
        """
        path = directory / f"seat-{header.seat}.header"
        write_durably(path, json.dumps(header.to_facts(), separators=(",", ":")).encode())
        return cls(directory, header)

    @classmethod
    def load(cls, directory: Path, seat: SeatIndex) -> tuple[SeatSpool, Receipt | None]:
        """Open what an earlier process left: whole chunks are kept, a torn one is cut off."""
        base = directory / f"seat-{seat}"
        header = ObjectHeader.from_facts(_read_json(base.with_suffix(".header")))
        receipt_path = base.with_suffix(".receipt")
        receipt = Receipt(**_read_json(receipt_path)) if receipt_path.exists() else None
        spool = cls(directory, header)
        spool._index(hashing=receipt is None)
        if receipt is not None and spool.chunks != header.chunks:
            raise CorruptError(f"{spool._path('chunks')}: accepted with {header.chunks} chunks, holds {spool.chunks}")
        return spool, receipt

    @property
    def chunks(self) -> int:
        """Whole chunks held: where an upload goes on."""
        return len(self._offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Sealed bytes held, without the length prefixes."""
        return self._offsets[-1] - _PREFIX_BYTES * self.chunks

    def append(self, sealed: bytes | memoryview) -> None:
        """Add the next chunk.

        Raises:
            OverloadedError: the disk is full; the chunk is not there.
        """
        start = self._offsets[-1]
        try:
            with reporting_full(self._directory, len(sealed)):
                os.lseek(self._file, start, os.SEEK_SET)
                write_fully(self._file, len(sealed).to_bytes(_PREFIX_BYTES, "big"))
                write_fully(self._file, sealed)
        except BaseException:
            os.ftruncate(self._file, start)
            raise
        self.digests.append(chunk_digest(sealed))
        self._offsets.append(start + _PREFIX_BYTES + len(sealed))
        if self._offsets[-1] // _SYNC_EVERY_BYTES != start // _SYNC_EVERY_BYTES:
            self._sync()

    def commit(self, receipt: Receipt) -> None:
        """Make the update and its receipt durable: the moment of acceptance.

        Raises:
            OverloadedError: the disk is full; the update is not accepted.
        """
        self._sync()
        write_durably(self._path("receipt"), json.dumps(asdict(receipt), separators=(",", ":")).encode())

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`; threads may call this at the same time."""
        start, end = self._offsets[index] + _PREFIX_BYTES, self._offsets[index + 1]
        sealed = os.pread(self._file, end - start, start)
        if len(sealed) != end - start:
            raise CorruptError(f"{self._path('chunks')}: chunk {index} is cut short")
        return sealed

    def close(self) -> None:
        """Give the file up."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def erase(self) -> None:
        """Remove everything of this update."""
        self.close()
        remove_seat(self._directory, self.header.seat)

    def _sync(self) -> None:
        with reporting_full(self._directory, self.size_bytes):
            sync_file(self._file, self._path("chunks"))

    def _path(self, suffix: str) -> Path:
        return self._base.with_suffix(f".{suffix}")

    def _index(self, *, hashing: bool) -> None:
        """Find the whole chunks and cut off what follows them."""
        end = os.fstat(self._file).st_size
        while self.chunks < self.header.chunks:
            start = self._offsets[-1] + _PREFIX_BYTES
            prefix = os.pread(self._file, _PREFIX_BYTES, self._offsets[-1])
            stop = start + int.from_bytes(prefix, "big")
            if len(prefix) < _PREFIX_BYTES or stop == start or stop > end:
                break
            self._offsets.append(stop)
            if hashing:
                self.digests.append(chunk_digest(self.read(self.chunks - 1)))
        os.ftruncate(self._file, self._offsets[-1])


def remove_seat(directory: Path, seat: SeatIndex) -> None:
    """Remove a seat's files, the receipt first."""
    for suffix in ("receipt", "chunks", "header"):
        (directory / f"seat-{seat}.{suffix}").unlink(missing_ok=True)
    sync_directory(directory)


def spooled_seats(directory: Path) -> Iterator[SeatIndex]:
    """Seats that have a header in a round's folder."""
    for path in sorted(directory.glob("seat-*.header")):
        match = _HEADER_NAME.fullmatch(path.name)
        if match:
            yield SeatIndex(int(match[1]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} is not readable: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptError(f"{path} is not readable: no JSON object")
    return facts
