"""How a range of float32 numbers becomes bytes. Legend: n elements, b block length, B = ceil(n / b) blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors import Float32s

_PIECE = 64 * 1024
_TINY = np.float32(np.finfo(np.float32).tiny)
_MAX_SCALE = np.float32(np.finfo(np.float32).max / 128)
NOT_FINITE = "holds NaN or infinite values; only finite ones are allowed"


class Quantiser(Protocol):
    """One way of writing float32 numbers; every body has a length known from the number of elements alone."""

    name: str
    lossy: bool

    def body_bytes(self, elements: int) -> int:
        """Length of the encoded body."""

    def encode(self, values_n: Float32s, body: memoryview) -> None:
        """Write all values into `body`. InvalidArgumentError: a value is not finite."""

    def check(self, body: memoryview, elements: int) -> None:
        """InvalidArgumentError: the body decodes to values that are not finite."""

    def decode(self, body: memoryview, out_n: Float32s) -> None:
        """Read the values back into `out_n`."""

    def add(self, body: memoryview, accumulator_n: NDArray[np.float64], weight: float) -> None:
        """Add weight times the decoded values to `accumulator_n`."""


def require_finite(values_n: Float32s, what: str) -> None:
    """Refuse NaN and infinities without a temporary.

    Raises:
        InvalidArgumentError: a value is not finite.
    """
    if values_n.size and not (np.isfinite(values_n.max()) and np.isfinite(values_n.min())):
        raise InvalidArgumentError(f"{what} {NOT_FINITE}")


def _pieces(elements: int, step: int = _PIECE) -> Iterator[slice]:
    for start in range(0, elements, step):
        yield slice(start, min(start + step, elements))


class Plain:
    """float32 as it is, little endian."""

    name = "none"
    lossy = False

    def body_bytes(self, elements: int) -> int:
        """Four bytes an element."""
        return 4 * elements

    def encode(self, values_n: Float32s, body: memoryview) -> None:
        """Copy."""
        require_finite(values_n, "chunk")
        np.frombuffer(body, np.float32)[:] = values_n

    def check(self, body: memoryview, elements: int) -> None:
        """All values finite."""
        require_finite(np.frombuffer(body, np.float32, elements), "chunk")

    def decode(self, body: memoryview, out_n: Float32s) -> None:
        """Copy."""
        out_n[:] = np.frombuffer(body, np.float32, out_n.size)

    def add(self, body: memoryview, accumulator_n: NDArray[np.float64], weight: float) -> None:
        """Add in float64."""
        values_n = np.frombuffer(body, np.float32, accumulator_n.size)
        scratch = np.empty(min(_PIECE, values_n.size), np.float64)
        for piece in _pieces(values_n.size):
            term = scratch[: piece.stop - piece.start]
            np.multiply(values_n[piece], weight, out=term, dtype=np.float64)
            accumulator_n[piece] += term


@dataclass(frozen=True, slots=True)
class Int8Blocks:
    """Blockwise absmax: B float32 scales, then n signed bytes; value = scale * byte, rounded to nearest.

    The error is at most half a step, absmax / 254 of the block. Blocks whose scale would be below the smallest normal
    float32 become zeros.
    """

    block: int = 256
    name = "int8"
    lossy = True

    def _blocks(self, elements: int) -> int:
        return -(-elements // self.block)

    def body_bytes(self, elements: int) -> int:
        """One byte an element and four a block."""
        return elements + 4 * self._blocks(elements)

    def encode(self, values_n: Float32s, body: memoryview) -> None:
        """Quantise in cache-sized pieces."""
        n = values_n.size
        scales_B = np.frombuffer(body, np.float32, self._blocks(n))
        steps_n = np.frombuffer(body, np.int8, n, scales_B.nbytes)
        step = max(_PIECE, self.block)
        scratch = np.empty(min(step, n), np.float32)
        whole = n - n % self.block
        for piece in _pieces(whole, step):
            blocks = slice(piece.start // self.block, piece.stop // self.block)
            self._quantise(values_n[piece], scales_B[blocks], steps_n[piece], scratch, self.block)
        if whole < n:
            self._quantise(values_n[whole:], scales_B[-1:], steps_n[whole:], scratch, n - whole)

    def _quantise(
        self, values: Float32s, scales: Float32s, steps: NDArray[np.int8], scratch: Float32s, block: int
    ) -> None:
        work = scratch[: values.size].reshape(-1, block)
        np.abs(values.reshape(-1, block), out=work)
        np.max(work, axis=1, out=scales)
        if not np.isfinite(scales.max()):
            raise InvalidArgumentError(f"chunk {NOT_FINITE}")
        scales /= np.float32(127)
        scales[scales < _TINY] = 0
        capped = bool((scales > _MAX_SCALE).any())
        np.minimum(scales, _MAX_SCALE, out=scales)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        np.multiply(values.reshape(-1, block), inverse[:, None], out=work)
        if capped:
            np.clip(work, -127, 127, out=work)
        np.rint(work, out=work)
        steps.reshape(-1, block)[:] = work

    def check(self, body: memoryview, elements: int) -> None:
        """Scales finite, not negative, small enough that no product overflows."""
        scales_B = np.frombuffer(body, np.float32, self._blocks(elements))
        if scales_B.size and not (scales_B.min() >= 0 and scales_B.max() <= _MAX_SCALE):
            raise InvalidArgumentError(f"chunk {NOT_FINITE} (a scale is negative, NaN or beyond {_MAX_SCALE})")

    def decode(self, body: memoryview, out_n: Float32s) -> None:
        """Multiply each byte with its scale."""
        n = out_n.size
        scales_B = np.frombuffer(body, np.float32, self._blocks(n))
        steps_n = np.frombuffer(body, np.int8, n, scales_B.nbytes)
        whole = n - n % self.block
        if whole:
            full = scales_B[: whole // self.block, None]
            np.multiply(steps_n[:whole].reshape(-1, self.block), full, out=out_n[:whole].reshape(-1, self.block))
        if whole < n:
            np.multiply(steps_n[whole:], scales_B[-1], out=out_n[whole:])

    def add(self, body: memoryview, accumulator_n: NDArray[np.float64], weight: float) -> None:
        """Add in float64; the decoded value itself is rounded to float32 first."""
        n = accumulator_n.size
        scales_B = np.frombuffer(body, np.float32, self._blocks(n))
        steps_n = np.frombuffer(body, np.int8, n, scales_B.nbytes)
        step = max(_PIECE, self.block)
        values = np.empty(min(step, n), np.float32)
        terms = np.empty(min(step, n), np.float64)
        for piece in _pieces(n, step):
            size = piece.stop - piece.start
            self._dequantise(steps_n[piece], scales_B[piece.start // self.block :], values[:size])
            np.multiply(values[:size], weight, out=terms[:size], dtype=np.float64)
            accumulator_n[piece] += terms[:size]

    def _dequantise(self, steps: NDArray[np.int8], scales: Float32s, out: Float32s) -> None:
        whole = out.size - out.size % self.block
        if whole:
            full = scales[: whole // self.block, None]
            np.multiply(steps[:whole].reshape(-1, self.block), full, out=out[:whole].reshape(-1, self.block))
        if whole < out.size:
            np.multiply(steps[whole:], scales[whole // self.block], out=out[whole:])
