"""ValidationManager: are data and models what they claim to be?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec import WeightCompressor, require_finite
from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.ids import Sha256Hex
from cortex_common.security.objects import ObjectHeader
from cortex_common.tensors import (
    Arena,
    ChunkRange,
    Float32s,
    Manifest,
    ManifestLimits,
    chunk_count,
    model_sha256,
)

_PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class ValidationManager:
    """Checks of manifests, updates, models and datasets; every refusal says what was given and what is allowed.

    Args:
        limits: Largest layout to accept.
        max_norm: Largest L2 norm of an update; None for no limit.

    >>> import numpy as np
    >>> from cortex import ValidationManager
    >>> validation = ValidationManager(max_norm=10.0)
    >>> validation.check_update(np.array([3.0, 4.0], np.float32))
    5.0
    >>> validation.check_update(np.array([30.0, 40.0], np.float32))
    Traceback (most recent call last):
    cortex_common.errors.InvalidArgumentError: update: L2 norm 50; at most 10 is allowed
    >>> validation.check_update(np.array([np.nan, 0.0], np.float32))
    Traceback (most recent call last):
    cortex_common.errors.InvalidArgumentError: update holds NaN or infinite values; ...
    """

    limits: ManifestLimits = field(default_factory=ManifestLimits)
    max_norm: float | None = None

    def read_manifest(self, text: bytes) -> Manifest:
        """A layout that somebody else wrote. InvalidArgumentError: beyond the limits, or impossible."""
        return Manifest.from_json(text, self.limits)

    def check_same_layout(self, given: Manifest, expected: Manifest) -> None:
        """Two layouts are one and the same.

        Raises:
            InvalidArgumentError: names the first tensor that differs.
        """
        if given.sha256 == expected.sha256:
            return
        for mine, theirs in zip(expected.entries, given.entries, strict=False):
            if mine != theirs:
                raise InvalidArgumentError(f"manifest: tensor {theirs} given where {mine} is expected")
        raise InvalidArgumentError(
            f"manifest: {len(given.entries)} tensors given where {len(expected.entries)} are expected"
        )

    def layout_violations(self, header: ObjectHeader, manifest: Manifest) -> list[Violation]:
        """What in an object's header contradicts the layout it should have."""
        chunks = chunk_count(manifest.elements, manifest.counters, header.chunk_elements)
        pairs: tuple[tuple[str, Any, Any], ...] = (
            ("manifest_sha256", header.manifest_sha256, manifest.sha256),
            ("elements", header.elements, manifest.elements),
            ("counters", header.counters, manifest.counters),
            ("chunks", header.chunks, chunks),
        )
        return [
            Violation(f"header.{name}", f"{given!r} given; this layout has {wanted!r}")
            for name, given, wanted in pairs
            if given != wanted
        ]

    def check_payload(self, codec: WeightCompressor, payload: bytes | memoryview, part: ChunkRange) -> None:
        """A chunk's plaintext has its length and decodes to finite numbers.

        Raises:
            InvalidArgumentError: NaN or infinite values.
            CorruptError: wrong length or packing.
        """
        try:
            codec.check(payload, part)
        except InvalidArgumentError as error:
            where = f"elements {part.start} to {part.stop - 1}"
            raise InvalidArgumentError(f"chunk {part.index} ({where}): {error.message}") from error

    def check_update(self, delta_D: Float32s) -> float:
        """An update is finite and not beyond `max_norm`; returns its L2 norm.

        Raises:
            InvalidArgumentError: not so.
        """
        require_finite(delta_D, "update")
        norm = l2_norm(delta_D)
        if self.max_norm is not None and norm > self.max_norm:
            raise InvalidArgumentError(f"update: L2 norm {norm:.6g}; at most {self.max_norm:.6g} is allowed")
        return norm

    def check_model(self, manifest: Manifest, arena: Arena, sha256: Sha256Hex | None = None) -> None:
        """A model fits its layout, is finite and has the digest it is known by.

        Raises:
            InvalidArgumentError: not so.
        """
        arena.require(manifest)
        require_finite(arena.values, "model")
        if sha256 is not None and (found := model_sha256(manifest, arena)) != sha256:
            raise InvalidArgumentError(f"model: digest {found} given; {sha256} is expected")

    def dataset_sha256(self, inputs: NDArray[Any], targets: NDArray[Any]) -> Sha256Hex:
        """Digest of a dataset: equal for equal examples in equal order, types and shapes.

        Raises:
            InvalidArgumentError: as many targets as inputs are needed; floating inputs must be finite.
        """
        if len(inputs) != len(targets):
            raise InvalidArgumentError(f"dataset: {len(inputs)} inputs and {len(targets)} targets")
        digest = hashlib.sha256()
        for array in (inputs, targets):
            if array.dtype.hasobject:
                raise InvalidArgumentError(f"dataset: arrays of {array.dtype}; allowed are numbers")
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise InvalidArgumentError("dataset: holds NaN or infinite values; only finite ones are allowed")
            digest.update(f"{array.dtype.newbyteorder('<').str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return Sha256Hex(digest.hexdigest())


def sum_of_squares(values: NDArray[np.floating[Any]]) -> float:
    """Sum of squares in float64, in cache-sized pieces. Without BLAS: its threads spin."""
    scratch = np.empty(min(_PIECE, values.size), np.float64)
    total = 0.0
    for start in range(0, values.size, _PIECE):
        piece = values[start : start + _PIECE]
        squares = scratch[: piece.size]
        np.multiply(piece, piece, out=squares, dtype=np.float64)
        total += float(squares.sum())
    return total


def l2_norm(values: NDArray[np.floating[Any]]) -> float:
    """Euclidean norm."""
    return float(np.sqrt(sum_of_squares(values)))
