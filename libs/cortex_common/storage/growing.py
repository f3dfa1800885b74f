"""Files that grow at their end by more than one wants to lose: synced on the way, and nothing torn stays in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cortex_common.storage.durable import (
    EARLY_BYTES,
    begin_sync,
    file_syncer,
    reporting_full,
    reporting_unreadable,
    sync_file,
    write_fully,
)

SYNC_EVERY_BYTES = 16 << 20
"""A power cut costs no more than this much of what was appended."""


class GrowingFile:
    """A file that is written at its end. Not for two threads at a time, except `read`.

    Attributes:
        end: Where the next append goes; what is beyond does not count.
    """

    def __init__(self, path: Path, *, new: bool = False, end: int = 0) -> None:
        """Open a file that is there, or an empty one. OSError: it cannot be opened."""
        flags = os.O_CREAT | os.O_TRUNC if new else 0
        self.end = end
        self._path = path
        self._file = os.open(path, os.O_RDWR | flags, 0o600)

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._file

    @property
    def syncer(self) -> Callable[[], None]:
        """Waits until all of it is on the disk; for `sync_together`."""
        return file_syncer(self._file, self._path)

    def append(self, *parts: bytes | memoryview) -> bool:
        """Add parts as one piece; whether everything up to here has been synced.

        Raises:
            OverloadedError: the disk is full; nothing of the piece stays.
        """
        start, size = self.end, sum(map(len, parts))
        try:
            with reporting_full(self._path.parent, size):
                written = os.pwritev(self._file, parts, start)
                if written < size:
                    os.lseek(self._file, start + written, os.SEEK_SET)
                    write_fully(self._file, b"".join(parts)[written:])
                self.end = start + size
                return self._sync_after(start)
        except BaseException:
            self.cut(start)
            raise

    def read(self, offset: int, size: int) -> bytes:
        """A range; shorter only at the end of the file. CorruptError: the medium failed."""
        with reporting_unreadable(self._path):
            return os.pread(self._file, size, offset)

    def cut(self, end: int) -> None:
        """Give up everything beyond."""
        os.ftruncate(self._file, end)
        self.end = end

    def close(self) -> None:
        """Give the file up; again does no harm."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _sync_after(self, start: int) -> bool:
        """Begin early, and wait every now and then."""
        if self.end // EARLY_BYTES != start // EARLY_BYTES:
            begin_sync(self._file)
        is_due = self.end // SYNC_EVERY_BYTES != start // SYNC_EVERY_BYTES
        if is_due:
            sync_file(self._file, self._path)
        return is_due
