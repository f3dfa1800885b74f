"""A version as the change from the one before it, made while it is folded. Legend: n elements of one chunk.

The version *is* what its delta gives: base + decoded delta, bit for bit what every worker computes that adds the delta
to the base it holds. What the codec left out is the residual; it goes into the next round's delta, so it never adds up.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.ids import Sha256Hex
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import ChunkRange, Float32s, Int64s


def delta_header(version: ObjectHeader, base_sha256: Sha256Hex, codec: WeightCompressor) -> ObjectHeader | None:
    """The header of a new version's delta; None with a codec that loses nothing: then the version travels whole."""
    if not codec.quantiser.lossy:
        return None
    kept = replace(
        version,
        kind=ObjectKind.DELTA,
        codec=codec.codec,
        codec_options=codec.options_json,
        base_sha256=base_sha256,
    )
    return kept.fresh()


class DeltaFold:
    """Encodes and seals a delta chunk by chunk; threads may share it."""

    def __init__(self, header: ObjectHeader, encryption: EncryptionManager) -> None:
        self._codec = WeightCompressor.from_wire(header.codec, header.codec_options)
        self._sealer = encryption.sealer(header)
        # The same fold made again, after a kill, gives the same delta, so the same version.
        self._seed = (header.base_sha256, header.round)

    def apply(self, part: ChunkRange, values_n: Float32s, target_n: Float32s, residual_n: Float32s) -> bytes:
        """The sealed chunk of the delta.

        Args:
            part: Which chunk.
            values_n: The base; becomes the version.
            target_n: What the version would be if nothing were left out.
            residual_n: Becomes target - version; what it holds before is of no account.

        Raises:
            InvalidArgumentError: the change is not finite.
        """
        np.subtract(target_n, values_n, out=residual_n)
        payload = self._codec.encode(residual_n, seed=rounding_seed(*self._seed, part.index))
        self._codec.decode_add(payload, values_n, 1.0)
        np.subtract(target_n, values_n, out=residual_n)
        return self._sealer.seal(part.index, payload)

    def counters(self, part: ChunkRange, counters: Int64s) -> bytes:
        """Integers travel as they are."""
        return self._sealer.seal(part.index, self._codec.encode_counters(counters))
