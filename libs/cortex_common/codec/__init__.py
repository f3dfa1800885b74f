"""Compact chunk payloads."""

from __future__ import annotations

from cortex_common.codec.compressor import CODECS, WeightCompressor
from cortex_common.codec.packing import Lz4Mode
from cortex_common.codec.quantisers import require_finite

__all__ = ["CODECS", "Lz4Mode", "WeightCompressor", "require_finite"]
