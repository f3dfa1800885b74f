"""Opened shards of a sealed data set: in anonymous memory that is a file on no disk, and that is wiped at the end."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

from services.worker.failures import WorkFailedError

_PIECE = 1 << 20


class OpenedShards:
    """The plaintext of some shards, one after another; the descriptor is given to the trainer.

    Attributes:
        digest: Of the data set's manifest.
        manifest: The manifest itself, JSON.
        shards: Their indices.
        view: Where they are to be opened to.
    """

    def __init__(self, digest: str, manifest: str, shards: tuple[int, ...], size: int) -> None:
        """Take memory.

        Raises:
            WorkFailedError: this system has none that is never a file.
        """
        if not hasattr(os, "memfd_create"):
            raise WorkFailedError(
                "sealed data are opened in memory only; needs memfd_create (Linux)", is_permanent=False
            )
        self.digest = digest
        self.manifest = manifest
        self.shards = shards
        self.descriptor = os.memfd_create("cortex-shards", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)
        self.view = memoryview(self._memory)

    def holds(self, digest: str, shards: tuple[int, ...]) -> bool:
        """Whether these are in it."""
        return self.descriptor >= 0 and (self.digest, self.shards) == (digest, shards)

    def erase(self) -> None:
        """Overwrite the data, and give the memory back, at the latest when nobody has a view of it any more."""
        if self.descriptor < 0:
            return
        zeros = bytes(_PIECE)
        for start in range(0, len(self.view), _PIECE):
            piece = self.view[start : start + _PIECE]
            piece[:] = zeros[: len(piece)]
            piece.release()
        view, self.view = self.view, memoryview(b"")
        with suppress(BufferError):
            view.release()
            self._memory.close()
        os.close(self.descriptor)
        self.descriptor = -1
