"""How a range of float32 numbers becomes bytes: what every way has in common, and the two plain ones.

Every method takes the compiled kernels, or None for the numpy code that gives the same bytes. Legend: n elements.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec.kernels import PLAIN_BLOCK, Kernel, Kernels, bf16_kernels, plain_kernels
from cortex_common.codec.rounding import Rounding
from cortex_common.errors import InvalidArgumentError
from cortex_common.job.codec_options import OptionValue
from cortex_common.tensors import Float32s

Accumulator = NDArray[np.float64] | Float32s
PIECE = 64 * 1024
INFINITE = np.uint32(0x7F800000)
NOT_FINITE = "holds NaN or infinite values; only finite ones are allowed"
NO_ROOM = np.empty(0, np.float32)


class Quantiser(Protocol):
    """One way of writing float32 numbers; every body has a length known from the number of elements alone."""

    @property
    def name(self) -> str:
        """As it stands in a header."""

    @property
    def lossy(self) -> bool:
        """Whether decoding gives other values than were encoded."""

    @property
    def stochastic(self) -> bool:
        """Whether the seed matters."""

    @property
    def key(self) -> Hashable:
        """Names the kernels this quantiser runs on."""

    def options(self) -> dict[str, OptionValue]:
        """All options, as they stand in a header."""

    def recipes(self) -> Mapping[str, Kernel]:
        """The kernels, to be compiled."""

    def body_bytes(self, elements: int) -> int:
        """Length of the encoded body."""

    def encode(
        self, values_n: Float32s, body: memoryview, rounding: Rounding, residual_n: Float32s, kernels: Kernels | None
    ) -> None:
        """Write all values into `body`, and values minus decoded values into `residual_n` unless it has size 0.

        The residual may be the values' own memory. InvalidArgumentError: a value is not finite.
        """

    def check(self, body: memoryview, elements: int, kernels: Kernels | None) -> None:
        """InvalidArgumentError: the body decodes to values that are not finite. CorruptError: it makes no sense."""

    def decode(self, body: memoryview, out_n: Float32s, kernels: Kernels | None) -> None:
        """Read the values back into `out_n`."""

    def add(self, body: memoryview, total_n: Accumulator, weight: float, kernels: Kernels | None) -> None:
        """Add weight times the decoded values to `total_n`: the product and the sum in float64."""


def require_finite(values_n: Float32s, what: str) -> None:
    """Refuse NaN and infinities without a temporary.

    Raises:
        InvalidArgumentError: a value is not finite.
    """
    if values_n.size and not (np.isfinite(values_n.max()) and np.isfinite(values_n.min())):
        raise InvalidArgumentError(f"{what} {NOT_FINITE}")


def require_finite_bits(largest: int) -> None:
    """Refuse a largest magnitude, given as float32 bits, that is NaN or infinite."""
    if largest >= INFINITE:
        raise InvalidArgumentError(f"chunk {NOT_FINITE}")


def pieces(elements: int, step: int = PIECE) -> Iterator[slice]:
    """Ranges that fit the second-level cache."""
    for start in range(0, elements, step):
        yield slice(start, min(start + step, elements))


def compiled_part(kernels: Kernels | None, elements: int, block: int, *arrays: NDArray[Any]) -> int:
    """How many of the first elements the kernels can take: whole blocks, where all memory is aligned and in order."""
    if kernels is None or not all(array.flags.aligned and array.flags.c_contiguous for array in arrays):
        return 0
    return elements - elements % block


def add_terms(values_n: Float32s, total_n: Accumulator, weight: float) -> None:
    """The numpy way to add: a product in float64, then one rounding to the accumulator's type."""
    scratch = np.empty(min(PIECE, values_n.size), np.float64)
    for piece in pieces(values_n.size):
        term = scratch[: piece.stop - piece.start]
        np.multiply(values_n[piece], weight, out=term, dtype=np.float64)
        np.add(total_n[piece], term, out=total_n[piece], casting="same_kind")


@dataclass(frozen=True, slots=True)
class Plain:
    """float32 as it is, little endian."""

    name = "none"
    lossy = False
    stochastic = False
    key = "none"

    def options(self) -> dict[str, OptionValue]:
        """None."""
        return {}

    def recipes(self) -> Mapping[str, Kernel]:
        """One pass to copy and look for what is not finite."""
        return plain_kernels()

    def body_bytes(self, elements: int) -> int:
        """Four bytes an element."""
        return 4 * elements

    def encode(
        self, values_n: Float32s, body: memoryview, rounding: Rounding, residual_n: Float32s, kernels: Kernels | None
    ) -> None:
        """Copy. The residual is zero."""
        out_n = np.frombuffer(body, np.float32)
        whole = compiled_part(kernels, values_n.size, PLAIN_BLOCK, values_n, out_n)
        if kernels and whole:
            require_finite_bits(kernels["encode"](values_n[:whole].view(np.uint32), out_n[:whole].view(np.uint32)))
        require_finite(values_n[whole:], "chunk")
        out_n[whole:] = values_n[whole:]
        residual_n.fill(0)

    def check(self, body: memoryview, elements: int, kernels: Kernels | None) -> None:
        """All values finite."""
        values_n = np.frombuffer(body, np.float32, elements)
        whole = compiled_part(kernels, elements, PLAIN_BLOCK, values_n)
        if kernels and whole:
            require_finite_bits(kernels["largest"](values_n[:whole].view(np.uint32)))
        require_finite(values_n[whole:], "chunk")

    def decode(self, body: memoryview, out_n: Float32s, kernels: Kernels | None) -> None:
        """Copy."""
        out_n[:] = np.frombuffer(body, np.float32, out_n.size)

    def add(self, body: memoryview, total_n: Accumulator, weight: float, kernels: Kernels | None) -> None:
        """Add."""
        values_n = np.frombuffer(body, np.float32, total_n.size)
        whole = compiled_part(kernels, total_n.size, PLAIN_BLOCK, values_n, total_n)
        if kernels and whole:
            kernels["add"](values_n[:whole], total_n[:whole], weight)
        add_terms(values_n[whole:], total_n[whole:], weight)


@dataclass(frozen=True, slots=True)
class Bf16:
    """The upper half of each float32, rounded to nearest even; the error is at most 1/256 of the value.

    What would round to infinity becomes the largest finite bf16.
    """

    name = "bf16"
    lossy = True
    stochastic = False
    key = "bf16"

    def options(self) -> dict[str, OptionValue]:
        """None."""
        return {}

    def recipes(self) -> Mapping[str, Kernel]:
        """All four ways are integer arithmetic."""
        return bf16_kernels()

    def body_bytes(self, elements: int) -> int:
        """Two bytes an element."""
        return 2 * elements

    def encode(
        self, values_n: Float32s, body: memoryview, rounding: Rounding, residual_n: Float32s, kernels: Kernels | None
    ) -> None:
        """Round."""
        halves_n = np.frombuffer(body, np.uint16)
        whole = compiled_part(kernels, values_n.size, PLAIN_BLOCK, values_n, halves_n, residual_n)
        if kernels and whole:
            words_n = values_n[:whole].view(np.uint32)
            require_finite_bits(kernels["encode"](values_n[:whole], words_n, halves_n[:whole], residual_n[:whole]))
        for piece in pieces(values_n.size - whole):
            part = slice(whole + piece.start, whole + piece.stop)
            self._round(values_n[part], halves_n[part], residual_n[part])

    def _round(self, values_n: Float32s, halves_n: NDArray[np.uint16], residual_n: Float32s) -> None:
        require_finite(values_n, "chunk")
        words_n = np.ascontiguousarray(values_n).view(np.uint32)
        rounded_n = (words_n >> 16) & 1
        rounded_n += np.uint32(0x7FFF)
        rounded_n += words_n
        rounded_n >>= 16
        rounded_n -= (rounded_n & 0x7FFF) >= 0x7F80
        halves_n[:] = rounded_n
        if residual_n.size:
            rounded_n <<= 16
            np.subtract(values_n, rounded_n.view(np.float32), out=residual_n)

    def check(self, body: memoryview, elements: int, kernels: Kernels | None) -> None:
        """All values finite."""
        halves_n = np.frombuffer(body, np.uint16, elements)
        whole = compiled_part(kernels, elements, PLAIN_BLOCK, halves_n)
        largest = int(kernels["largest"](halves_n[:whole])) if kernels and whole else 0
        for piece in pieces(elements - whole):
            largest = max(largest, int((halves_n[whole:][piece] & 0x7FFF).max()))
        require_finite_bits(largest << 16)

    def decode(self, body: memoryview, out_n: Float32s, kernels: Kernels | None) -> None:
        """Shift back."""
        halves_n = np.frombuffer(body, np.uint16, out_n.size)
        words_n = out_n.view(np.uint32)
        whole = compiled_part(kernels, out_n.size, PLAIN_BLOCK, halves_n, words_n)
        if kernels and whole:
            kernels["decode"](halves_n[:whole], words_n[:whole])
        np.left_shift(halves_n[whole:], 16, out=words_n[whole:], dtype=np.uint32)

    def add(self, body: memoryview, total_n: Accumulator, weight: float, kernels: Kernels | None) -> None:
        """Shift back and add."""
        halves_n = np.frombuffer(body, np.uint16, total_n.size)
        whole = compiled_part(kernels, total_n.size, PLAIN_BLOCK, halves_n, total_n)
        if kernels and whole:
            kernels["add"](halves_n[:whole], total_n[:whole], weight)
        for piece in pieces(total_n.size - whole):
            part = slice(whole + piece.start, whole + piece.stop)
            words_n = np.left_shift(halves_n[part], 16, dtype=np.uint32)
            add_terms(words_n.view(np.float32), total_n[part], weight)
