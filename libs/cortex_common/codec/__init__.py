"""Compact chunk payloads."""

from __future__ import annotations

from cortex_common.codec.compressor import WeightCompressor
from cortex_common.codec.packing import Lz4Mode
from cortex_common.codec.quantisers import require_finite
from cortex_common.codec.rounding import rounding_seed
from cortex_common.codec.warming import WarmUp, warm_up
from cortex_common.job.codec_options import CODECS

__all__ = ["CODECS", "Lz4Mode", "WarmUp", "WeightCompressor", "require_finite", "rounding_seed", "warm_up"]
