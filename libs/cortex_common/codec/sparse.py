"""The largest magnitudes only. Legend: n elements in segments of 4096 (the last may be short), K picked in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec.blocks import Blocks
from cortex_common.codec.kernels import SEGMENT, Kernel, Kernels, topk_kernels
from cortex_common.codec.quantisers import (
    Accumulator,
    Plain,
    add_terms,
    compiled_part,
    pieces,
    require_finite,
    require_finite_bits,
)
from cortex_common.codec.rounding import Rounding
from cortex_common.errors import CorruptError
from cortex_common.job.codec_options import OptionValue
from cortex_common.tensors import Float32s

Places = NDArray[np.int64]
_VALUE_BLOCK = 64


class _Layout(NamedTuple):
    """Where things are in a body; all of it follows from the number of elements."""

    whole: int  # elements in full segments
    each: int  # picked in a full segment
    picked: int  # picked in all, K
    values_bytes: int


@dataclass(frozen=True, slots=True)
class TopK:
    """In each segment the largest magnitudes, as many as the density says; everything else decodes to zero.

    The body: the K picked values as the inner quantiser writes them, the lower 8 bits of their places in their
    segments, then the upper 4 bits (byte j: value j in the lower half, value ceil(K / 2) + j in the upper). Places
    ascend within a segment. Of equal magnitudes the first are taken.
    """

    density: float
    values: OptionValue = "int8"
    stochastic: bool = False
    name = "topk"
    lossy = True
    key = "topk"

    @property
    def _inner(self) -> Plain | Blocks:
        return Plain() if self.values == "fp32" else Blocks(127, _VALUE_BLOCK, self.stochastic)

    def _of_values(self, kernels: Kernels | None) -> Kernels | None:
        return None if self.values == "fp32" else kernels

    def options(self) -> dict[str, OptionValue]:
        """Density, form of the values, and rounding."""
        return {"density": self.density, "values": self.values, "stochastic": self.stochastic}

    def recipes(self) -> Mapping[str, Kernel]:
        """Selection, and those of the values."""
        return {**topk_kernels(), **Blocks(127, _VALUE_BLOCK).recipes()}

    def body_bytes(self, elements: int) -> int:
        """Known from the number of elements, as the number of values picked is."""
        layout = self._layout(elements)
        return layout.values_bytes + layout.picked + (layout.picked + 1) // 2

    def _count(self, elements: int) -> int:
        return min(max(int(self.density * elements + 0.5), 1), elements)

    def _layout(self, elements: int) -> _Layout:
        whole = elements - elements % SEGMENT
        count = self._count(SEGMENT)
        picked = whole // SEGMENT * count + self._count(elements - whole)
        return _Layout(whole, count, picked, self._inner.body_bytes(picked))

    def encode(
        self, values_n: Float32s, body: memoryview, rounding: Rounding, residual_n: Float32s, kernels: Kernels | None
    ) -> None:
        """Pick, then write what was picked."""
        layout = self._layout(values_n.size)
        places_K = self._pick(values_n, layout, kernels)
        picked_K = values_n[places_K]
        left_K = np.empty(picked_K.size if residual_n.size else 0, np.float32)
        self._inner.encode(picked_K, body[: layout.values_bytes], rounding, left_K, self._of_values(kernels))
        self._write_places(places_K, body[layout.values_bytes :])
        if residual_n.size:
            np.copyto(residual_n, values_n)
            residual_n[places_K] = left_K

    def _pick(self, values_n: Float32s, layout: _Layout, kernels: Kernels | None) -> Places:
        places_K = np.empty(layout.picked, np.int64)
        done = compiled_part(kernels, values_n.size, SEGMENT, values_n)
        if kernels and done:
            picked = places_K[: done // SEGMENT * layout.each]
            require_finite_bits(kernels["select"](values_n[:done].view(np.uint32), layout.each, picked))
        require_finite(values_n[done:], "chunk")
        at = done // SEGMENT * layout.each
        for part, width in _rows(done, values_n.size):
            found = _largest(values_n[part].reshape(-1, width), self._count(width))
            places_K[at : at + found.size] = found + part.start
            at += found.size
        return places_K

    def _write_places(self, places_K: Places, body: memoryview) -> None:
        within = (places_K % SEGMENT).astype(np.uint16)
        low, high = _planes(body, within.size)
        low[:] = within & 255
        upper = (within >> 8).astype(np.uint8)
        high[:] = upper[: high.size]
        high[: within.size // 2] |= upper[high.size :] << 4

    def _within(self, body: memoryview, layout: _Layout) -> Places:
        """Places in their segments, in the order of the values."""
        low, high = _planes(body[layout.values_bytes :], layout.picked)
        within = low.astype(np.int64)
        within[: high.size] |= (high & 15).astype(np.int64) << 8
        within[high.size :] |= (high[: layout.picked // 2] >> 4).astype(np.int64) << 8
        return within

    def _places(self, body: memoryview, layout: _Layout) -> Places:
        places_K = self._within(body, layout)
        full = layout.whole // SEGMENT
        rows = places_K[: full * layout.each].reshape(full, layout.each)
        rows += np.arange(full, dtype=np.int64)[:, None] * SEGMENT
        places_K[full * layout.each :] += layout.whole
        return places_K

    def check(self, body: memoryview, elements: int, kernels: Kernels | None) -> None:
        """Values finite; places ascending in each segment and not beyond its end."""
        layout = self._layout(elements)
        self._inner.check(body[: layout.values_bytes], layout.picked, self._of_values(kernels))
        within = self._within(body, layout)
        full = layout.whole // SEGMENT * layout.each
        rows, tail = within[:full].reshape(-1, layout.each), within[full:]
        if tail.size and int(tail[-1]) >= elements - layout.whole:
            raise CorruptError(f"chunk names a place beyond its {elements} elements")
        if not ((rows[:, 1:] > rows[:, :-1]).all() and (tail[1:] > tail[:-1]).all()):
            raise CorruptError("chunk names places that do not ascend")

    def decode(self, body: memoryview, out_n: Float32s, kernels: Kernels | None) -> None:
        """Zeros, and the picked values."""
        layout = self._layout(out_n.size)
        out_n.fill(0)
        out_n[self._places(body, layout)] = self._picked(body, layout, kernels)

    def add(self, body: memoryview, total_n: Accumulator, weight: float, kernels: Kernels | None) -> None:
        """Touch the picked places only."""
        layout = self._layout(total_n.size)
        places_K = self._places(body, layout)
        sums_K = total_n[places_K]
        add_terms(self._picked(body, layout, kernels), sums_K, weight)
        total_n[places_K] = sums_K

    def _picked(self, body: memoryview, layout: _Layout, kernels: Kernels | None) -> Float32s:
        picked_K = np.empty(layout.picked, np.float32)
        self._inner.decode(body[: layout.values_bytes], picked_K, self._of_values(kernels))
        return picked_K


def _planes(body: memoryview, picked: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    data = np.frombuffer(body, np.uint8)
    return data[:picked], data[picked:]


def _rows(start: int, stop: int) -> Iterator[tuple[slice, int]]:
    """Pieces of full segments with a segment's length, then the short one at the end with its own."""
    whole = stop - stop % SEGMENT
    for piece in pieces(whole - start):
        yield slice(start + piece.start, start + piece.stop), SEGMENT
    if whole < stop:
        yield slice(whole, stop), stop - whole


def _largest(rows: Float32s, count: int) -> Places:
    """Places, in the flattened rows, of the `count` largest magnitudes of each row; the first among equals."""
    keys = np.ascontiguousarray(rows).view(np.uint32) & 0x7FFFFFFF
    limit = np.partition(keys, keys.shape[1] - count, axis=1)[:, keys.shape[1] - count, None]
    above, equal = keys > limit, keys == limit
    wanted = count - np.count_nonzero(above, axis=1, keepdims=True)
    return np.flatnonzero(above | (equal & (np.cumsum(equal, axis=1) <= wanted)))
