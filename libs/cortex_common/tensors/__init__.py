"""The flat model: manifest, arena, chunk ranges, digest, safetensors in and out."""

from __future__ import annotations

from cortex_common.tensors.arena import Arena, Float32s, Int64s
from cortex_common.tensors.chunks import (
    DEFAULT_CHUNK_ELEMENTS,
    MAX_CHUNK_ELEMENTS,
    ChunkRange,
    check_chunk_elements,
    chunk_count,
    chunk_range,
    chunk_ranges,
    iter_chunks,
)
from cortex_common.tensors.digest import ModelDigest, model_sha256
from cortex_common.tensors.manifest import Manifest, ManifestLimits, TensorEntry, TensorKind
from cortex_common.tensors.safetensors import FileLimits, read_safetensors, safetensors_parts, write_safetensors

__all__ = [
    "DEFAULT_CHUNK_ELEMENTS",
    "MAX_CHUNK_ELEMENTS",
    "Arena",
    "ChunkRange",
    "FileLimits",
    "Float32s",
    "Int64s",
    "Manifest",
    "ManifestLimits",
    "ModelDigest",
    "TensorEntry",
    "TensorKind",
    "check_chunk_elements",
    "chunk_count",
    "chunk_range",
    "chunk_ranges",
    "iter_chunks",
    "model_sha256",
    "read_safetensors",
    "safetensors_parts",
    "write_safetensors",
]
