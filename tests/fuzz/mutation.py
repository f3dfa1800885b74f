"""Inputs that are almost right: seeds, changed in the ways in which decoders are caught out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_MAX_BYTES = 64 * 1024
_ODD_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
_ODD_TEXTS = (
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b'""', b"{}", b"[]", b"[" * 300, b"{" * 300),
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"&a *a", b"<<: *a", b"!!python/object:os.system", b"? !!map"),
    *(b"../../../etc/passwd", b"%00", b"\r\n", b"__metadata__", b"data_offsets", b"\xe2\x80\xae", b"1_000", b"0x10"),
)


def mutations(seeds: Sequence[bytes], chance: random.Random) -> Iterator[bytes]:
    """Every seed as it is, then changed ones without end."""
    pool = [seed[:_MAX_BYTES] for seed in seeds] or [b""]
    yield from pool
    while True:
        data = bytearray(chance.choice(pool))
        for _ in range(1 + int(chance.expovariate(0.7))):
            _change(data, pool, chance)
        yield bytes(data[:_MAX_BYTES])


def _change(data: bytearray, pool: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    chance.choice(_CHANGES)(data, at, pool, chance)


def _flip(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    if data:
        data[at % len(data)] ^= 1 << chance.randrange(8)


def _replace(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    if data:
        data[at % len(data)] = chance.randrange(256)


def _insert(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    data[at:at] = chance.randbytes(chance.randint(1, 8))


def _remove(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    del data[at : at + 1 + int(chance.expovariate(0.2))]


def _cut(data: bytearray, at: int, _pool: Sequence[bytes], _chance: random.Random) -> None:
    del data[at:]


def _splice(data: bytearray, at: int, pool: Sequence[bytes], chance: random.Random) -> None:
    other = chance.choice(pool)
    data[at:] = other[chance.randrange(len(other) + 1) :]


def _repeat(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    size = 1 + int(chance.expovariate(0.1))
    data[at:at] = data[at : at + size] * chance.randint(1, 4)


def _number(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    width = chance.choice((1, 2, 4, 8))
    number = chance.choice(_ODD_NUMBERS) & ((1 << 8 * width) - 1)
    data[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))


def _text(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    data[at : at + chance.choice((0, 0, 0, 1, 4, 8))] = chance.choice(_ODD_TEXTS)


def _blank(data: bytearray, at: int, _pool: Sequence[bytes], chance: random.Random) -> None:
    size = min(len(data) - at, 1 + int(chance.expovariate(0.1)))
    data[at : at + size] = bytes(size)


_CHANGES = (_flip, _replace, _insert, _remove, _cut, _splice, _repeat, _number, _text, _text, _blank)
