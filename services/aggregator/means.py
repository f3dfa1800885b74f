"""The weighted mean of many sealed updates, chunk by chunk. Legend: n elements of one chunk, K updates.

Updates are added in the order given, in float64: the order of arrival does not show in the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.security.encryption import EncryptionManager
from cortex_common.tensors import ChunkRange, Int64s
from services.aggregator.sealed import Plaintext, SealedChunks, SealedSource


class MeanOfUpdates:
    """K updates and their weights; threads may share it but for `encode`."""

    def __init__(
        self, updates: Sequence[SealedChunks], weights: Sequence[float], encryption: EncryptionManager
    ) -> None:
        self._sources = [SealedSource(update, encryption) for update in updates]
        self._weights = list(weights)
        self.total_weight = float(sum(weights))
        self._plain = Plaintext()
        self._sum_n = np.empty(0, np.float64)
        self._mean_n = np.empty(0, np.float32)
        self._room = bytearray()
        self._codec = WeightCompressor.create("none", lz4="off")

    def mean(self, part: ChunkRange, sum_n: NDArray[np.float64], plain: Plaintext) -> None:
        """Write the mean of a chunk into `sum_n`. CorruptError: an update does not open."""
        sum_n.fill(0.0)
        for source, weight in zip(self._sources, self._weights, strict=True):
            source.add(part, sum_n, weight, plain)
        sum_n /= self.total_weight

    def counters(self, part: ChunkRange, plain: Plaintext) -> Int64s:
        """The largest of each integer. CorruptError: an update does not open."""
        highest: Int64s | None = None
        for source in self._sources:
            counters = source.counters(part, plain)
            highest = counters if highest is None else np.maximum(highest, counters, out=highest)
        if highest is None:
            raise CorruptError("a mean needs at least one update")
        return highest

    def encode(self, part: ChunkRange) -> bytes | bytearray | memoryview:
        """The payload of a chunk of the mean, rounded once to float32, good until the next call; one caller at a time.

        Raises:
            CorruptError: an update does not open.
            PreconditionError: the updates add up to something that is not finite.
        """
        if part.is_counters:
            return self._codec.encode_counters(self.counters(part, self._plain))
        if self._sum_n.size < part.elements:
            self._sum_n = np.empty(part.elements, np.float64)
            self._mean_n = np.empty(part.elements, np.float32)
            self._room = bytearray(self._codec.max_payload_bytes(part))
        sum_n = self._sum_n[: part.elements]
        self.mean(part, sum_n, self._plain)
        mean_n = self._mean_n[: part.elements]
        with np.errstate(over="ignore"):
            np.copyto(mean_n, sum_n, casting="same_kind")
        try:
            return self._codec.encode_into(mean_n, self._room)
        except InvalidArgumentError as error:
            where = f"elements {part.start} to {part.stop - 1}"
            raise PreconditionError(f"the updates add up to values that are not finite ({where})") from error
