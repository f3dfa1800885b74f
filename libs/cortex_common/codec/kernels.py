"""The hot loops, as plain functions that numba can compile. No numba here: `native` compiles them.

Each factory fixes the block length, because a constant inner trip count is what lets the compiler use the whole vector
unit. The functions take whole blocks only, rounding step by step exactly as the numpy code of the quantisers does.
`bits` is the same memory as `values`, read as uint32. A function is long where it is one compiled loop.
"""
# Constants a kernel uses stand in this file: the compiler's cache notices changes of this file only.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bits = np.uint32

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_TINY = np.float32(np.finfo(np.float32).tiny)
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_RANDOM_STEP = np.float32(1 / 65536)
_MIX0, _MIX1 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
PLAIN_BLOCK = 256
SEGMENT = 4096


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function to compile, and the types of its arguments: one tuple for each variant, in `native`'s notation."""

    function: Callable[..., Any]
    variants: tuple[tuple[str, ...], ...]


Kernels = dict[str, Callable[..., Any]]
_SUMS = ("f8[]", "f4[]")


def block_kernels(width: int, levels: int, cap: float) -> dict[str, Kernel]:
    """Blockwise absmax quantisation to -levels ... levels; 7 levels are packed two to a byte."""
    encode = ("f4[r]", "u4[r]", "f4[]", "i1[]", "f4[]", "b1", "u4", "u4")
    unpack = ("i1[r]", "f4[r]")
    return {
        "encode": Kernel(_block_encode(width, levels, cap), (encode,)),
        "add": Kernel(
            _nibble_add(width) if levels == 7 else _byte_add(width), tuple((*unpack, s, "f8") for s in _SUMS)
        ),
        "decode": Kernel(_nibble_decode(width) if levels == 7 else _byte_decode(width), ((*unpack, "f4[]"),)),
    }


def _block_encode(width: int, levels: int, cap: float) -> Callable[..., Any]:  # noqa: C901
    top, most, half, nibbles = np.float32(levels), np.float32(cap), width // 2, levels == 7

    def encode_blocks(  # noqa: C901
        values: Array,
        bits: Array,
        scales: Array,
        packed: Array,
        residual: Array,
        is_stochastic: bool,
        key0: Bits,
        key1: Bits,
    ) -> Bits:
        """Largest magnitude met, as bits. The residual, where it has room, may be the values' own memory."""
        pairs = np.empty(width, np.int8)
        left = np.empty(width, np.float32)
        word = np.empty(1, np.uint32)
        number = word.view(np.float32)
        worst = np.uint32(0)
        for b in range(scales.size):
            start = b * width
            steps = pairs if nibbles else packed[start : start + width]
            v, u = values[start : start + width], bits[start : start + width]
            largest = np.uint32(0)
            for j in range(width):
                largest = max(largest, u[j] & _MAGNITUDE)
            worst = max(worst, largest)
            word[0] = largest
            scale = number[0] / top
            if scale < _TINY:
                scale = _ZERO
            elif scale > most:
                scale = most
            scales[b] = scale
            inverse = _ZERO
            if scale > _ZERO:
                inverse = _ONE / scale
            if is_stochastic:
                for j in range(width):
                    h = np.uint32(np.uint32(start + j) ^ key0)
                    h = np.uint32(h ^ (h >> np.uint32(16)))
                    h = np.uint32(h * _MIX0)
                    h = np.uint32(h ^ key1)
                    h = np.uint32(h ^ (h >> np.uint32(15)))
                    h = np.uint32(h * _MIX1)
                    uniform = (np.float32(np.int32(h >> np.uint32(16))) + _HALF) * _RANDOM_STEP
                    x = np.floor(v[j] * inverse + uniform)
                    steps[j] = np.int8(np.int32(max(min(x, top), -top)))
            else:
                for j in range(width):
                    x = np.rint(v[j] * inverse)
                    steps[j] = np.int8(np.int32(max(min(x, top), -top)))
            if nibbles:
                for j in range(half):
                    packed[b * half + j] = np.int8((steps[j] + 8) | ((steps[half + j] + 8) << 4))
            if residual.size:
                for j in range(width):
                    left[j] = v[j] - np.float32(steps[j]) * scale
                for j in range(width):
                    residual[start + j] = left[j]
        return worst

    return encode_blocks


def _byte_add(width: int) -> Callable[..., Any]:
    def add_bytes(packed: Array, scales: Array, total: Array, weight: float) -> None:
        for b in range(scales.size):
            start, scale = b * width, scales[b]
            for j in range(width):
                total[start + j] += np.float64(np.float32(packed[start + j]) * scale) * weight

    return add_bytes


def _byte_decode(width: int) -> Callable[..., Any]:
    def decode_bytes(packed: Array, scales: Array, out: Array) -> None:
        for b in range(scales.size):
            start, scale = b * width, scales[b]
            for j in range(width):
                out[start + j] = np.float32(packed[start + j]) * scale

    return decode_bytes


def _nibble_add(width: int) -> Callable[..., Any]:
    half = width // 2

    def add_nibbles(packed: Array, scales: Array, total: Array, weight: float) -> None:
        for b in range(scales.size):
            start, low, scale = b * width, b * half, scales[b]
            high = start + half
            for j in range(half):
                step = np.int32(packed[low + j] & 15) - np.int32(8)
                total[start + j] += np.float64(np.float32(step) * scale) * weight
            for j in range(half):
                step = np.int32((packed[low + j] >> 4) & 15) - np.int32(8)
                total[high + j] += np.float64(np.float32(step) * scale) * weight

    return add_nibbles


def _nibble_decode(width: int) -> Callable[..., Any]:
    half = width // 2

    def decode_nibbles(packed: Array, scales: Array, out: Array) -> None:
        for b in range(scales.size):
            start, low, scale = b * width, b * half, scales[b]
            high = start + half
            for j in range(half):
                out[start + j] = np.float32(np.int32(packed[low + j] & 15) - np.int32(8)) * scale
            for j in range(half):
                out[high + j] = np.float32(np.int32((packed[low + j] >> 4) & 15) - np.int32(8)) * scale

    return decode_nibbles


def plain_kernels() -> dict[str, Kernel]:
    """float32 as it is."""

    def copy_plain(bits: Array, out: Array) -> Bits:
        """Largest magnitude met, as bits."""
        worst = np.uint32(0)
        for b in range(bits.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                word = bits[start + j]
                worst = max(worst, word & _MAGNITUDE)
                out[start + j] = word
        return worst

    def largest_plain(bits: Array) -> Bits:
        worst = np.uint32(0)
        for b in range(bits.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                worst = max(worst, bits[start + j] & _MAGNITUDE)
        return worst

    def add_plain(values: Array, total: Array, weight: float) -> None:
        for b in range(values.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                total[start + j] += np.float64(values[start + j]) * weight

    return {
        "encode": Kernel(copy_plain, (("u4[r]", "u4[]"),)),
        "largest": Kernel(largest_plain, (("u4[r]",),)),
        "add": Kernel(add_plain, tuple(("f4[r]", s, "f8") for s in _SUMS)),
    }


def bf16_kernels() -> dict[str, Kernel]:  # noqa: C901
    """The upper half of a float32, rounded to nearest even."""

    def encode_bf16(values: Array, bits: Array, halves: Array, residual: Array) -> Bits:
        """Largest magnitude met, as bits. The residual, where it has room, may be the values' own memory."""
        words = np.empty(PLAIN_BLOCK, np.uint32)
        decoded = words.view(np.float32)
        worst = np.uint32(0)
        for b in range(bits.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                word = bits[start + j]
                worst = max(worst, word & _MAGNITUDE)
                rounded = np.uint32(word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1)))
                rounded = np.uint32(rounded >> np.uint32(16))
                if (rounded & np.uint32(0x7FFF)) >= np.uint32(0x7F80):
                    rounded = np.uint32(rounded - np.uint32(1))
                halves[start + j] = np.uint16(rounded)
            if residual.size:
                for j in range(PLAIN_BLOCK):
                    words[j] = np.uint32(halves[start + j]) << np.uint32(16)
                for j in range(PLAIN_BLOCK):
                    decoded[j] = values[start + j] - decoded[j]
                for j in range(PLAIN_BLOCK):
                    residual[start + j] = decoded[j]
        return worst

    def add_bf16(halves: Array, total: Array, weight: float) -> None:
        words = np.empty(PLAIN_BLOCK, np.uint32)
        decoded = words.view(np.float32)
        for b in range(halves.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                words[j] = np.uint32(halves[start + j]) << np.uint32(16)
            for j in range(PLAIN_BLOCK):
                total[start + j] += np.float64(decoded[j]) * weight

    def largest_bf16(halves: Array) -> np.uint16:
        worst = np.uint16(0)
        for b in range(halves.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                worst = max(worst, np.uint16(halves[start + j] & np.uint16(0x7FFF)))
        return worst

    def decode_bf16(halves: Array, words: Array) -> None:
        for b in range(halves.size // PLAIN_BLOCK):
            start = b * PLAIN_BLOCK
            for j in range(PLAIN_BLOCK):
                words[start + j] = np.uint32(halves[start + j]) << np.uint32(16)

    return {
        "encode": Kernel(encode_bf16, (("f4[r]", "u4[r]", "u2[]", "f4[]"),)),
        "add": Kernel(add_bf16, tuple(("u2[r]", s, "f8") for s in _SUMS)),
        "largest": Kernel(largest_bf16, (("u2[r]",),)),
        "decode": Kernel(decode_bf16, (("u2[r]", "u4[]"),)),
    }


def topk_kernels() -> dict[str, Kernel]:  # noqa: C901
    """Exact selection of the largest magnitudes of each segment."""

    def select_topk(bits: Array, count: int, places: Array) -> Bits:  # noqa: C901
        """Write `count` ascending places for each segment of 4096; largest magnitude met, as bits.

        The threshold is found by bisection over the bit patterns; counting is one vector pass in the first-level
        cache. Among equals the first ones win.
        """
        keys = np.empty(SEGMENT, np.int32)
        worst = np.int32(0)
        guess = np.int64(0)
        for s in range(bits.size // SEGMENT):
            start = s * SEGMENT
            largest = np.int32(0)
            for j in range(SEGMENT):
                key = np.int32(np.uint32(bits[start + j] & _MAGNITUDE))
                keys[j] = key
                largest = max(largest, key)
            worst = max(worst, largest)
            # At least `count` keys reach `low`; fewer reach `high`.
            low, high = np.int64(0), np.int64(largest) + 1
            middle, step = guess, np.int64(1) << 17
            while high - low > 1:
                if middle <= low or middle >= high:
                    middle = low + (high - low) // 2
                limit = np.int32(middle)
                below = np.int32(0)
                for j in range(SEGMENT):
                    below = np.int32(below - (np.int32(keys[j] - limit) >> np.int32(31)))
                reach = SEGMENT - below
                if reach >= count:
                    low = middle
                else:
                    high = middle
                if reach == count:
                    break
                # Segments are alike: look near the last threshold first, in growing steps, then bisect.
                if high > largest:
                    middle = low + step
                elif low == 0:
                    middle = high - step
                else:
                    middle = low + (high - low) // 2
                step *= 2
            guess = low
            above = np.int64(0)
            for j in range(SEGMENT):
                above += keys[j] > guess
            equals = count - above
            out = s * count
            for j in range(SEGMENT):
                if keys[j] >= guess and (keys[j] > guess or equals > 0):
                    places[out] = start + j
                    out += 1
                    equals -= keys[j] == guess
        return np.uint32(worst)

    return {"select": Kernel(select_topk, (("u4[r]", "i8", "i8[]"),))}
