"""The chunks of an update, made when they are due. Legend: n elements of one chunk."""

from __future__ import annotations

import numpy as np

from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.tensors import ChunkRange
from services.worker.residuals import Feedback
from services.worker.workbench import Workbench


class DeltaEncoder:
    """Payloads of the update's chunks: result - base, never more than a chunk of it in memory.

    Args:
        bench: Holds both arenas.
        codec: Of the round.
        seed: What tells this update from all others; with the chunk's index the seed of stochastic rounding.
        is_first: Round 0: the base is zero.
        feedback: Adds what earlier updates left out; None without error feedback.
    """

    def __init__(
        self,
        bench: Workbench,
        codec: WeightCompressor,
        seed: tuple[int, ...] = (),
        *,
        is_first: bool,
        feedback: Feedback | None = None,
    ) -> None:
        self._base = bench.base
        self._result = bench.result
        self._codec = codec
        self._seed = feedback.kept.seed if feedback else seed
        self._is_first = is_first
        self._feedback = feedback
        self._scratch = np.empty(0, np.float32)

    def encode(self, chunk: ChunkRange) -> bytes | bytearray:
        """The payload of a range; counters travel as they are."""
        if chunk.is_counters:
            return self._codec.encode_counters(self._result.counters)
        result = self._result.values[chunk.start : chunk.stop]
        if self._is_first:
            return self._codec.encode(result)
        if self._scratch.size < chunk.elements:
            self._scratch = np.empty(chunk.elements, np.float32)
        delta_n = self._scratch[: chunk.elements]
        np.subtract(result, self._base.values[chunk.start : chunk.stop], out=delta_n)
        if self._feedback is not None:
            self._feedback.apply(chunk, delta_n)
        return self._codec.encode(delta_n, seed=rounding_seed(*self._seed, chunk.index))
