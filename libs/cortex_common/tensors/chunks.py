"""Cutting the arena into the ranges that travel, are sealed and are folded one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cortex_common.errors import InvalidArgumentError

DEFAULT_CHUNK_ELEMENTS = 512 * 1024
"""fp32 elements in a chunk (2 MiB): smaller ones cost CPU a message, larger ones memory and what a cut sends again."""
MIN_CHUNK_ELEMENTS = 256
MAX_CHUNK_ELEMENTS = 1024 * 1024 - 1024
"""A sealed chunk of this many fp32 elements still fits a 4 MiB message."""


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Elements [start, stop) of the fp32 section, or of the counters when `is_counters`."""

    index: int
    start: int
    stop: int
    is_counters: bool = False

    @property
    def elements(self) -> int:
        """Numbers in the range."""
        return self.stop - self.start

    @property
    def plain_bytes(self) -> int:
        """Bytes of the numbers, uncompressed."""
        return self.elements * (8 if self.is_counters else 4)


def check_chunk_elements(chunk_elements: int) -> None:
    """Refuse a chunk size that cannot travel.

    Raises:
        InvalidArgumentError: out of range.
    """
    if not MIN_CHUNK_ELEMENTS <= chunk_elements <= MAX_CHUNK_ELEMENTS:
        raise InvalidArgumentError(
            f"chunk_elements {chunk_elements}: allowed are {MIN_CHUNK_ELEMENTS} to {MAX_CHUNK_ELEMENTS}"
        )


def chunk_count(elements: int, counters: int, chunk_elements: int) -> int:
    """Number of chunks: the fp32 section in equal pieces (the last may be short), then one with all counters if any."""
    check_chunk_elements(chunk_elements)
    return -(-elements // chunk_elements) + (1 if counters else 0)


def chunk_range(index: int, elements: int, counters: int, chunk_elements: int) -> ChunkRange:
    """The range of chunk `index`."""
    start = index * chunk_elements
    if start < elements:
        return ChunkRange(index, start, min(start + chunk_elements, elements))
    return ChunkRange(index, 0, counters, is_counters=True)


def iter_chunks(elements: int, counters: int, chunk_elements: int) -> Iterator[ChunkRange]:
    """All ranges in order, without building a list."""
    for index in range(chunk_count(elements, counters, chunk_elements)):
        yield chunk_range(index, elements, counters, chunk_elements)


def chunk_ranges(elements: int, counters: int, chunk_elements: int = DEFAULT_CHUNK_ELEMENTS) -> tuple[ChunkRange, ...]:
    """All ranges in order: they cover each number exactly once."""
    return tuple(iter_chunks(elements, counters, chunk_elements))
