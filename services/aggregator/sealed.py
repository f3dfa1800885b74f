"""Reading sealed objects chunk by chunk: updates, versions and outer states alike."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader
from cortex_common.tensors import ChunkRange, Float32s, Int64s


class SealedChunks(Protocol):
    """Where sealed chunks are read from: a seat's spool or a blob."""

    header: ObjectHeader

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`."""


class Plaintext:
    """Room for one opened chunk, used again and again by one thread."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def room(self, size: int) -> bytearray:
        """At least `size` bytes."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return self._bytes


class SealedSource:
    """Opens and decodes the chunks of one object; threads may share it, each with a Plaintext of its own."""

    def __init__(self, chunks: SealedChunks, encryption: EncryptionManager) -> None:
        self._chunks = chunks
        self._opener = encryption.opener(chunks.header)
        self._codec = WeightCompressor.from_wire(chunks.header.codec, chunks.header.codec_options)

    def values(self, part: ChunkRange, out_n: Float32s, plain: Plaintext) -> Float32s:
        """The values of a chunk, into `out_n`. CorruptError: it does not open."""
        return self._codec.decode(self._open(part, plain), part.elements, out_n)

    def add(self, part: ChunkRange, sum_n: NDArray[np.float64], weight: float, plain: Plaintext) -> None:
        """Add weight times the values of a chunk. CorruptError: it does not open."""
        self._codec.decode_add(self._open(part, plain), sum_n, weight)

    def counters(self, part: ChunkRange, plain: Plaintext) -> Int64s:
        """The integers of a chunk. CorruptError: it does not open."""
        return self._codec.decode_counters(self._open(part, plain), part.elements)

    def _open(self, part: ChunkRange, plain: Plaintext) -> memoryview:
        wanted = self._codec.max_payload_bytes(part)
        sealed = self._chunks.read(part.index)
        if len(sealed) > wanted + TAG_BYTES:
            raise CorruptError(f"stored chunk {part.index} is longer than its range allows")
        return self._opener.open_into(part.index, sealed, plain.room(wanted))
