"""Blockwise absmax quantisation: int8 and int4. Legend: n elements, w block length, B = ceil(n / w) blocks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec.kernels import Kernel, Kernels, block_kernels
from cortex_common.codec.quantisers import (
    NOT_FINITE,
    PIECE,
    Accumulator,
    add_terms,
    compiled_part,
    pieces,
    require_finite_bits,
)
from cortex_common.codec.rounding import Rounding
from cortex_common.errors import InvalidArgumentError
from cortex_common.job.codec_options import OptionValue
from cortex_common.tensors import Float32s

Steps = NDArray[np.int8]
_TINY = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Blocks:
    """B float32 scales, then one step an element; value = scale * step, scale = absmax of the block / `levels`.

    With 127 levels a step is a signed byte. With 7 levels it takes half a byte, plus 8: byte j of a block of m elements
    holds element j in its lower half and element ceil(m / 2) + j in its upper.

    The error is at most half a step (a whole one when stochastic). Blocks whose scale would be below the smallest
    normal float32 become zeros.
    """

    levels: int
    block: int
    stochastic: bool = False
    lossy = True

    @property
    def name(self) -> str:
        """int8 or int4."""
        return "int4" if self._nibbles else "int8"

    @property
    def key(self) -> Hashable:
        """Compiled for each block length."""
        return self.name, self.block

    @property
    def cap(self) -> np.float32:
        """No scale is larger, so that no product overflows."""
        return np.float32(np.finfo(np.float32).max / (self.levels + 1))

    @property
    def _nibbles(self) -> bool:
        return self.levels == 7

    def options(self) -> dict[str, OptionValue]:
        """Block length and rounding."""
        return {"block": self.block, "stochastic": self.stochastic}

    def recipes(self) -> Mapping[str, Kernel]:
        """For whole blocks."""
        return block_kernels(self.block, self.levels, float(self.cap))

    def body_bytes(self, elements: int) -> int:
        """One byte or half a byte an element, and four a block."""
        return 4 * self._blocks(elements) + self._packed_bytes(elements)

    def _blocks(self, elements: int) -> int:
        return -(-elements // self.block)

    def _packed_bytes(self, elements: int) -> int:
        """A block is even, so only the last byte can be half empty."""
        return (elements + 1) // 2 if self._nibbles else elements

    def _parts(self, body: memoryview, elements: int) -> tuple[Float32s, Steps]:
        scales_B = np.frombuffer(body, np.float32, self._blocks(elements))
        return scales_B, np.frombuffer(body, np.int8, self._packed_bytes(elements), scales_B.nbytes)

    def encode(
        self, values_n: Float32s, body: memoryview, rounding: Rounding, residual_n: Float32s, kernels: Kernels | None
    ) -> None:
        """Quantise whole blocks by kernel, the rest in cache-sized pieces."""
        n = values_n.size
        scales_B, packed = self._parts(body, n)
        whole = compiled_part(kernels, n, self.block, values_n, scales_B, residual_n)
        if kernels and whole:
            mine, bits = values_n[:whole], values_n[:whole].view(np.uint32)
            scales, steps = scales_B[: whole // self.block], packed[: self._packed_bytes(whole)]
            chance = (rounding.is_stochastic, rounding.key0, rounding.key1)
            require_finite_bits(kernels["encode"](mine, bits, scales, steps, residual_n[:whole], *chance))
        for part, width in self._whole_and_tail(whole, n):
            scales = scales_B[part.start // self.block : self._blocks(part.stop)]
            steps = self._quantise(values_n[part].reshape(-1, width), scales, rounding, part.start)
            packed[self._packed_bytes(part.start) : self._packed_bytes(part.stop)] = self._pack(steps)
            if residual_n.size:
                np.subtract(values_n[part], (steps * scales[:, None]).ravel(), out=residual_n[part])

    def _whole_and_tail(self, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Pieces of whole blocks with the block's length, then the short block at the end with its own."""
        whole = stop - stop % self.block
        for piece in pieces(whole - start, max(PIECE, self.block)):
            yield slice(start + piece.start, start + piece.stop), self.block
        if whole < stop:
            yield slice(whole, stop), stop - whole

    def _quantise(self, values: Float32s, scales: Float32s, rounding: Rounding, start: int) -> Steps:
        """Steps of blocks (rows), and their scales."""
        work = np.abs(values)
        np.max(work, axis=1, out=scales)
        if not np.isfinite(scales.max()):
            raise InvalidArgumentError(f"chunk {NOT_FINITE}")
        scales /= np.float32(self.levels)
        scales[scales < _TINY] = 0
        np.minimum(scales, self.cap, out=scales)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        np.multiply(values, inverse[:, None], out=work)
        rounding.apply(work.reshape(-1), start)
        np.clip(work, -self.levels, self.levels, out=work)
        return work.astype(np.int8)

    def _pack(self, steps: Steps) -> Steps:
        if not self._nibbles:
            return steps.ravel()
        blocks, width = steps.shape
        half = (width + 1) // 2
        shifted = np.full((blocks, 2 * half), 8, np.uint8)
        shifted[:, :width] += steps.view(np.uint8)
        shifted[:, :half] |= shifted[:, half:] << 4
        return shifted[:, :half].ravel().view(np.int8)

    def _steps(self, packed: Steps, part: slice, width: int) -> Steps:
        """Steps of blocks (rows)."""
        mine = packed[self._packed_bytes(part.start) : self._packed_bytes(part.stop)]
        if not self._nibbles:
            return mine.reshape(-1, width)
        mine = mine.reshape(-1, (width + 1) // 2)
        steps = np.concatenate((mine & 15, (mine >> 4) & 15), axis=1)
        steps -= 8
        return steps[:, :width]

    def check(self, body: memoryview, elements: int, kernels: Kernels | None) -> None:
        """Scales finite, not negative, small enough that no product overflows."""
        scales_B, _ = self._parts(body, elements)
        if scales_B.size and not (scales_B.min() >= 0 and scales_B.max() <= self.cap):
            raise InvalidArgumentError(f"chunk {NOT_FINITE} (a scale is negative, NaN or beyond {self.cap})")

    def decode(self, body: memoryview, out_n: Float32s, kernels: Kernels | None) -> None:
        """Multiply each step with its scale."""
        n = out_n.size
        scales_B, packed = self._parts(body, n)
        whole = compiled_part(kernels, n, self.block, scales_B, out_n)
        if kernels and whole:
            kernels["decode"](packed[: self._packed_bytes(whole)], scales_B[: whole // self.block], out_n[:whole])
        for part, width in self._whole_and_tail(whole, n):
            scales = scales_B[part.start // self.block : self._blocks(part.stop), None]
            np.multiply(self._steps(packed, part, width), scales, out=out_n[part].reshape(-1, width))

    def add(self, body: memoryview, total_n: Accumulator, weight: float, kernels: Kernels | None) -> None:
        """The decoded value itself is rounded to float32 first."""
        n = total_n.size
        scales_B, packed = self._parts(body, n)
        whole = compiled_part(kernels, n, self.block, scales_B, total_n)
        if kernels and whole:
            scales = scales_B[: whole // self.block]
            kernels["add"](packed[: self._packed_bytes(whole)], scales, total_n[:whole], weight)
        for part, width in self._whole_and_tail(whole, n):
            scales = scales_B[part.start // self.block : self._blocks(part.stop), None]
            add_terms((self._steps(packed, part, width) * scales).ravel(), total_n[part], weight)
