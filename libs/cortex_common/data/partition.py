"""How the examples of a dataset are dealt to the seats of a cohort.

Every node computes the deal by itself: it depends on the labels, the scheme, its seed and the number of seats only.
Every example is in exactly one seat, except with `local`, where each node trains on all of its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import InvalidArgumentError

Indices = NDArray[np.int64]

_DEFAULT_ALPHA = 0.5
_DEFAULT_SHARDS = 2
SCHEMES = ("iid", "dirichlet", "shards", "local")


@dataclass(frozen=True, slots=True)
class Partition:
    """A way to deal examples.

    Attributes:
        scheme: iid (equal random parts) | dirichlet (each class split by Dirichlet(alpha)) | shards (label-sorted
            pieces) | local.
        seed: Of the deal.
        alpha: Concentration of dirichlet, above 0: small means uneven. None: 0.5.
        per_worker: Shards a seat gets. None: 2.
    """

    scheme: str = "iid"
    seed: int = 0
    alpha: float | None = None
    per_worker: int | None = None


def shuffled(seed: Sequence[int], count: int) -> Indices:
    """A random order of 0..count-1, from raw PCG64 output: the same in every numpy version."""
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def partition(labels: NDArray[Any], deal: Partition, seats: int) -> list[Indices]:
    """The sorted indices of each seat.

    Args:
        labels: Class of each example, shape (N,).
        deal: Scheme and its arguments.
        seats: How many parts.

    Raises:
        InvalidArgumentError: unknown scheme, impossible argument, or fewer examples than parts.
    """
    if seats < 1:
        raise InvalidArgumentError(f"partition: {seats} seats given; allowed: at least 1")
    examples = len(labels)
    if deal.scheme == "local":
        return [np.arange(examples, dtype=np.int64)] * seats
    if examples < seats:
        raise InvalidArgumentError(f"partition: {examples} examples cannot be dealt to {seats} workers")
    if deal.scheme == "iid":
        parts = np.array_split(shuffled((deal.seed,), examples), seats)
    elif deal.scheme == "dirichlet":
        parts = _dirichlet(labels, deal, seats)
    elif deal.scheme == "shards":
        parts = _shards(labels, deal, seats)
    else:
        raise InvalidArgumentError(f"partition.scheme: {deal.scheme!r} given; allowed: {', '.join(SCHEMES)}")
    return [np.sort(part) for part in parts]


def _dirichlet(labels: NDArray[Any], deal: Partition, seats: int) -> list[Indices]:
    """Split each class by proportions drawn from Dirichlet(alpha); no seat stays empty.

    The proportions are those of `numpy.random.Generator.dirichlet`, which numpy may change in a new release: nodes that
    train together on this scheme should run the same numpy.

    Source: Hsu, Qi and Brown, arXiv 1909.06335.
    """
    alpha = _DEFAULT_ALPHA if deal.alpha is None else deal.alpha
    if not (alpha > 0 and np.isfinite(alpha)):
        raise InvalidArgumentError(f"partition.alpha: {alpha} given; allowed: above 0")
    pieces: list[list[Indices]] = [[] for _ in range(seats)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[shuffled((deal.seed, 1, int(label) & 0xFFFFFFFF), len(members))]
        generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence((deal.seed, 2, int(label) & 0xFFFFFFFF)))
        )
        shares = generator.dirichlet(np.full(seats, alpha))
        cuts = np.rint(np.cumsum(np.nan_to_num(shares, nan=1 / seats))[:-1] * len(members)).astype(np.int64)
        for piece, part in zip(pieces, np.split(members, np.clip(cuts, 0, len(members))), strict=True):
            piece.append(part)
    return _none_empty([np.concatenate(piece) for piece in pieces])


def _none_empty(parts: list[Indices]) -> list[Indices]:
    """Give each empty part one example of the largest."""
    for seat, part in enumerate(parts):
        if len(part) == 0:
            richest = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[seat], parts[richest] = parts[richest][:1], parts[richest][1:]
    return parts


def _shards(labels: NDArray[Any], deal: Partition, seats: int) -> list[Indices]:
    """Sort by label, cut into seats x per_worker shards, deal them at random.

    Source: McMahan et al., arXiv 1602.05629, section 3.
    """
    per_worker = _DEFAULT_SHARDS if deal.per_worker is None else deal.per_worker
    count = seats * per_worker
    if per_worker < 1 or count > len(labels):
        raise InvalidArgumentError(
            f"partition.per_worker: {per_worker} given; allowed: 1 to {len(labels) // seats} "
            f"({len(labels)} examples, {seats} workers)"
        )
    order = shuffled((deal.seed, 3), len(labels))
    shards = np.array_split(order[np.argsort(labels[order], kind="stable")], count)
    hand = shuffled((deal.seed, 4), count).reshape(seats, per_worker)
    return [np.concatenate([shards[index] for index in hand[seat]]) for seat in range(seats)]
