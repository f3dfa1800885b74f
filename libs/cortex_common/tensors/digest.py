"""The digest that names a model version."""

from __future__ import annotations

import hashlib

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import Sha256Hex
from cortex_common.tensors.arena import Arena, Float32s, Int64s
from cortex_common.tensors.manifest import Manifest


class ModelDigest:
    """SHA-256 of the model's safetensors file, fed range by range: the fp32 section in order, then the counters."""

    def __init__(self, manifest: Manifest) -> None:
        self._hash = hashlib.sha256(manifest.safetensors_header())
        self._left = manifest.model_bytes

    def update(self, numbers: Float32s | Int64s) -> None:
        """Add the next numbers."""
        self._left -= numbers.nbytes
        self._hash.update(numbers.data)

    def hexdigest(self) -> Sha256Hex:
        """The digest of the whole model.

        Raises:
            InvalidArgumentError: more or fewer numbers were added than the manifest has.
        """
        if self._left:
            raise InvalidArgumentError(
                f"digest of a model: {abs(self._left)} bytes too {'few' if self._left > 0 else 'many'}"
            )
        return Sha256Hex(self._hash.hexdigest())


def model_sha256(manifest: Manifest, arena: Arena) -> Sha256Hex:
    """Digest of a whole model: what `sha256sum` says of its safetensors file."""
    digest = ModelDigest(manifest)
    digest.update(arena.values)
    digest.update(arena.counters)
    return digest.hexdigest()
