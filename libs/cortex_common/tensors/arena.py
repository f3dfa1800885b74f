"""The flat buffers that hold a model's numbers. Shapes: D fp32 elements, C integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors.manifest import Manifest, TensorEntry

Float32s = NDArray[np.float32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arena:
    """One model's numbers: `values` float32 (D,), `counters` int64 (C,); the memory may be shared."""

    values: Float32s
    counters: Int64s

    def __post_init__(self) -> None:
        """Refuse arrays of another type or shape: everything after this relies on them."""
        for what, array, dtype in (("values", self.values, np.float32), ("counters", self.counters, np.int64)):
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise InvalidArgumentError(f"arena {what}: a flat, contiguous {np.dtype(dtype).name} array is needed")

    @classmethod
    def zeros(cls, manifest: Manifest) -> Arena:
        """A fresh arena of zeros for this layout."""
        return cls(np.zeros(manifest.elements, np.float32), np.zeros(manifest.counters, np.int64))

    def require(self, manifest: Manifest) -> None:
        """Check that this arena fits a layout.

        Raises:
            InvalidArgumentError: another number of elements or counters.
        """
        if (self.values.size, self.counters.size) != (manifest.elements, manifest.counters):
            raise InvalidArgumentError(
                f"arena of {self.values.size} elements and {self.counters.size} counters; "
                f"the manifest has {manifest.elements} and {manifest.counters}"
            )

    def view(self, entry: TensorEntry) -> Float32s | Int64s:
        """One tensor in its shape, as a view: writing to it writes to the arena."""
        end = entry.offset + entry.elements
        if entry.dtype == "F32":
            return self.values[entry.offset : end].reshape(entry.shape)
        return self.counters[entry.offset : end].reshape(entry.shape)

    def views(self, manifest: Manifest) -> dict[str, Float32s | Int64s]:
        """All tensors by name, as views."""
        return {entry.name: self.view(entry) for entry in manifest.entries}
