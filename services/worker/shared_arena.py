"""An arena in anonymous shared memory, seen by a worker and its trainer child at the same time."""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from cortex_common.tensors import Arena, Manifest


class SharedArena:
    """Memory for one model; the descriptor may be sent to another process, which attaches to it.

    Attributes:
        arena: The numbers: fp32 section, then counters.
    """

    def __init__(self, descriptor: int, manifest: Manifest) -> None:
        """Map the memory behind a descriptor, which this object owns from now on."""
        self._descriptor = descriptor
        values_bytes = _padded(manifest.elements)
        memory = mmap.mmap(descriptor, _size(manifest))
        self.arena = Arena(
            np.frombuffer(memory, np.float32, manifest.elements),
            np.frombuffer(memory, np.int64, manifest.counters, offset=values_bytes if manifest.counters else 0),
        )

    @classmethod
    def create(cls, manifest: Manifest) -> SharedArena:
        """Fresh memory, zero everywhere; pages cost nothing until they are written."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("cortex-arena", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, _size(manifest))
        return cls(descriptor, manifest)

    @property
    def descriptor(self) -> int:
        """What the other process needs."""
        return self._descriptor

    def close(self) -> None:
        """Let go of the descriptor; the memory goes when nobody maps it any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _padded(elements: int) -> int:
    """Bytes of the fp32 section, rounded up so that the counters are aligned."""
    return -(-4 * elements // 8) * 8


def _size(manifest: Manifest) -> int:
    return max(_padded(manifest.elements) + 8 * manifest.counters, mmap.PAGESIZE)
