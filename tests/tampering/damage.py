"""What may happen to bytes that were stored or sent: the damage, drawn at random, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cortex_common.errors import CortexError

Pieces = tuple[bytes, ...]


@dataclass(frozen=True)
class Subject:
    """Something stored or sent, in pieces that could be lost, swapped or replaced one by one.

    Attributes:
        name: For people.
        pieces: As it was written.
        earlier: Pieces of an older one of the same job, in the same places.
        foreign: Pieces of another job's, in the same places.
        read: What the code that uses it takes from it; raises CortexError when it finds damage.
    """

    name: str
    pieces: Pieces
    earlier: Pieces
    foreign: Pieces
    read: Callable[[Sequence[bytes]], Any]


@dataclass
class Tally:
    """What became of the damage done to a subject, by kind of damage and outcome."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    believed: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        return sum(number for (_, each), number in self.outcomes.items() if each == outcome)


def tamper(subject: Subject, times: int, seed: int) -> Tally:
    """Damage a subject again and again, each time as it was written; nothing else may ever be taken from it."""
    random, tally = np.random.default_rng(seed), Tally()
    right = subject.read(subject.pieces)
    for _ in range(times):
        kind, damaged = _damaged(subject, random)
        try:
            found = subject.read(damaged)
        except CortexError:
            tally.outcomes[kind, "refused"] += 1
        else:
            if found != right:
                tally.believed.append(f"{kind}: {_difference(subject.pieces, damaged)}")
            tally.outcomes[kind, "unharmed" if found == right else "believed"] += 1
    return tally


def _damaged(subject: Subject, random: np.random.Generator) -> tuple[str, Pieces]:
    """Pieces that differ from those written, and how that came."""
    while True:
        kind = _KINDS[random.choice(len(_KINDS), p=_SHARES)]
        damaged = tuple(_DAMAGES[kind](list(subject.pieces), subject, random))
        if damaged != subject.pieces:
            return kind, damaged


def _flip(pieces: list[bytes], _subject: Subject, random: np.random.Generator) -> list[bytes]:
    """One byte is another, anywhere: each is as likely."""
    at = int(random.integers(sum(map(len, pieces))))
    for index, piece in enumerate(pieces):
        if at < len(piece):
            changed = bytearray(piece)
            changed[at] ^= int(random.integers(1, 256))
            pieces[index] = bytes(changed)
            break
        at -= len(piece)
    return pieces


def _truncate(pieces: list[bytes], _subject: Subject, random: np.random.Generator) -> list[bytes]:
    """Cut off: everything from some byte on, or the end of one piece."""
    index = int(random.integers(len(pieces)))
    cut = pieces[index][: int(random.integers(len(pieces[index]) + 1))]
    rest = pieces[index + 1 :] if random.integers(2) else [b""] * (len(pieces) - index - 1)
    return [*pieces[:index], cut, *rest]


def _lose(pieces: list[bytes], _subject: Subject, random: np.random.Generator) -> list[bytes]:
    """One piece is gone and the others are there, every second time the first."""
    pieces[int(random.integers(len(pieces))) if random.integers(2) else 0] = b""
    return pieces


def _reorder(pieces: list[bytes], _subject: Subject, random: np.random.Generator) -> list[bytes]:
    """Two pieces in each other's place, or one twice."""
    one, two = random.integers(len(pieces), size=2)
    pieces[one], pieces[two] = pieces[two], pieces[two if random.integers(2) else one]
    return pieces


def _replay(pieces: list[bytes], subject: Subject, random: np.random.Generator) -> list[bytes]:
    """One piece, or all but one, as of an older object of the job."""
    return _exchanged(pieces, subject.earlier, random)


def _splice(pieces: list[bytes], subject: Subject, random: np.random.Generator) -> list[bytes]:
    """One piece, or all but one, of another job's object."""
    return _exchanged(pieces, subject.foreign, random)


def _exchanged(pieces: list[bytes], other: Pieces, random: np.random.Generator) -> list[bytes]:
    index = int(random.integers(len(pieces)))
    if random.integers(2):
        pieces[index] = other[index]
        return pieces
    return [*other[:index], pieces[index], *other[index + 1 :]] if len(pieces) > 1 else list(other)


_DAMAGES = {
    "flip": _flip,
    "truncate": _truncate,
    "lose": _lose,
    "reorder": _reorder,
    "replay": _replay,
    "splice": _splice,
}
_KINDS = tuple(_DAMAGES)
_SHARES = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)


def _difference(before: Pieces, after: Pieces) -> str:
    parts = [
        f"piece {index}: {old[:60]!r}… became {new[:60]!r}… (at byte {_first(old, new)})"
        for index, (old, new) in enumerate(zip(before, after, strict=True))
        if old != new
    ]
    return "; ".join(parts[:3])


def _first(old: bytes, new: bytes) -> int:
    return next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
