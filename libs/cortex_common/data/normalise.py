"""From stored values to what a network sees: scale, then standardise with constants written down here.

Constants, because every node must see the same inputs, whatever part of the data it holds. They are the mean and
standard deviation of all training pixels after scaling to 0..1.

With the network and recipe of `cortex demo` (784-512-256-10, Adam 1e-3, batch 32, 1 local epoch, 4 IID workers,
FedAvg) test accuracy after 8 rounds of Fashion-MNIST was (two seeds) 0.874 and 0.877 standardised, 0.873 and 0.869
scaled to 0..1, 0.871 and 0.873 scaled to -1..1; 0.865 was reached in round 4, 6 and 6. So: standardised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE = 4096


@dataclass(frozen=True, slots=True)
class Normalisation:
    """(value / scale - mean) / std, in float32."""

    scale: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Normalised copy, worked in pieces so that no second full-size array is made."""
        out = np.empty(values.shape, np.float32)
        factor = np.float32(1 / (self.scale * self.std))
        shift = np.float32(self.mean / self.std)
        for start in range(0, len(values), _PIECE):
            piece = out[start : start + _PIECE]
            np.multiply(values[start : start + _PIECE], factor, out=piece, casting="unsafe")
            piece -= shift
        return out


FASHION_MNIST = Normalisation(255, 0.2860, 0.3530)
MNIST = Normalisation(255, 0.1307, 0.3081)
DIGITS = Normalisation(16, 0.3053, 0.3760)
BYTES = Normalisation(255)
NONE = Normalisation()
