"""Reproducible stochastic rounding: a hash of (seed, place), so that encoding again gives the same bytes.

Legend: n elements.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cortex_common.tensors import Float32s

_MASK64 = (1 << 64) - 1


def rounding_seed(*parts: int | str) -> int:
    """A seed of 64 bits from everything that tells one chunk of one update from all others.

    Args:
        parts: For example job seed, round, seat, chunk index.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Rounding:
    """To the nearest step, or up and down at random so that the expected value is the value itself.

    The 32-bit keys feed a hash of each element's place; its upper 16 bits are the random number.
    """

    is_stochastic: bool
    key0: np.uint32
    key1: np.uint32

    @classmethod
    def of(cls, seed: int, *, is_stochastic: bool) -> Rounding:
        """Rounding seeded by any integer; seeds that differ in a bit give unrelated numbers (splitmix64)."""
        mixed = (seed + 0x9E3779B97F4A7C15) & _MASK64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        mixed ^= mixed >> 31
        return cls(is_stochastic, np.uint32(mixed & 0xFFFFFFFF), np.uint32(mixed >> 32))

    def apply(self, scaled_n: Float32s, start: int) -> None:
        """Round in place; element i is at place start + i of its chunk."""
        if self.is_stochastic:
            scaled_n += self._uniform(start, scaled_n.size).reshape(scaled_n.shape)
            np.floor(scaled_n, out=scaled_n)
        else:
            np.rint(scaled_n, out=scaled_n)

    def _uniform(self, start: int, count: int) -> Float32s:
        """Numbers (m + 1/2) / 65536 with m from 0 to 65535: exact in float32 even after adding 127."""
        mixed: NDArray[np.uint32] = np.arange(start, start + count, dtype=np.uint32)
        mixed ^= self.key0
        mixed ^= mixed >> 16
        mixed *= np.uint32(0x7FEB352D)
        mixed ^= self.key1
        mixed ^= mixed >> 15
        mixed *= np.uint32(0x846CA68B)
        mixed >>= np.uint32(16)
        uniform = mixed.astype(np.float32)
        uniform += np.float32(0.5)
        uniform *= np.float32(1 / 65536)
        return uniform


NEAREST = Rounding(False, np.uint32(0), np.uint32(0))
