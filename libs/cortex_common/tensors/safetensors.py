"""Safetensors files: writing a model, and reading weights that somebody else wrote, with every limit checked first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors.arena import Arena, Float32s, Int64s
from cortex_common.tensors.manifest import Manifest

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}


@dataclass(frozen=True, slots=True)
class FileLimits:
    """What a file of weights may hold."""

    max_header_bytes: int = 1 << 20
    max_tensors: int = 20_000
    max_file_bytes: int = 1 << 40


def safetensors_parts(manifest: Manifest, arena: Arena) -> Iterator[bytes | memoryview]:
    """The model's file, in order; its SHA-256 is the model's digest."""
    arena.require(manifest)
    yield manifest.safetensors_header()
    yield arena.values.data.cast("B")
    yield arena.counters.data.cast("B")


def write_safetensors(target: BinaryIO, manifest: Manifest, arena: Arena) -> None:
    """Write the model's file."""
    for part in safetensors_parts(manifest, arena):
        target.write(part)


def read_safetensors(source: Path | bytes, limits: FileLimits = FileLimits()) -> dict[str, Float32s | Int64s]:
    """Read weights by name: floating tensors as float32, integer ones as int64, as copies.

    Raises:
        InvalidArgumentError: not a safetensors file, beyond a limit, truncated, overlapping, or a value is not finite.
    """
    name = str(source) if isinstance(source, Path) else "weights"
    if isinstance(source, bytes):
        return _read(memoryview(source), name, limits)
    try:
        return _read(np.memmap(source, np.uint8, "r").data, name, limits)
    except FileNotFoundError as exc:
        raise InvalidArgumentError(f"{name}: there is no such file") from exc
    except (OSError, ValueError) as exc:
        raise InvalidArgumentError(f"{name}: cannot be read as a safetensors file: {exc}") from exc


def _read(data: memoryview, name: str, limits: FileLimits) -> dict[str, Float32s | Int64s]:
    header_end, header = _header(data, name, limits)
    tensors: dict[str, Float32s | Int64s] = {}
    expected = 0
    for key, item in sorted(header.items(), key=lambda pair: _offsets(pair[1], f"{name}: {pair[0][:80]!r}")):
        where = f"{name}: tensor {key[:80]!r}"
        start, end = _offsets(item, where)
        dtype, shape = item.get("dtype"), item.get("shape")
        if dtype not in _WIDTHS:
            raise InvalidArgumentError(f"{where}: dtype {str(dtype)[:20]!r}; allowed are {', '.join(_WIDTHS)}")
        if (
            not isinstance(shape, list)
            or len(shape) > 32
            or any(type(n) is not int or not 0 <= n < 1 << 48 for n in shape)
        ):
            raise InvalidArgumentError(f"{where}: shape is not a list of sizes")
        if start != expected or end - start != prod(shape) * _WIDTHS[dtype]:
            raise InvalidArgumentError(
                f"{where}: offsets {start} to {end} do not fit its shape or leave a gap or overlap"
            )
        if header_end + end > len(data):
            raise InvalidArgumentError(f"{where}: ends behind the end of the file (truncated?)")
        tensors[key] = _numbers(data[header_end + start : header_end + end], dtype, where).reshape(shape)
        expected = end
    if header_end + expected != len(data):
        raise InvalidArgumentError(f"{name}: {len(data) - header_end - expected} bytes follow the last tensor")
    return tensors


def _header(data: memoryview, name: str, limits: FileLimits) -> tuple[int, dict[str, dict[str, Any]]]:
    if len(data) > limits.max_file_bytes:
        raise InvalidArgumentError(f"{name}: {len(data)} bytes; at most {limits.max_file_bytes} are allowed")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or length > limits.max_header_bytes:
        raise InvalidArgumentError(
            f"{name}: not a safetensors file (header of {length} bytes; at most {limits.max_header_bytes} allowed)"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as exc:
        raise InvalidArgumentError(f"{name}: not a safetensors file (its header is not JSON)") from exc
    if not isinstance(header, dict):
        raise InvalidArgumentError(f"{name}: not a safetensors file (its header is not a JSON object)")
    header.pop("__metadata__", None)
    if len(header) > limits.max_tensors:
        raise InvalidArgumentError(f"{name}: {len(header)} tensors; at most {limits.max_tensors} are allowed")
    return 8 + length, header


def _offsets(item: object, where: str) -> tuple[int, int]:
    offsets = item.get("data_offsets") if isinstance(item, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise InvalidArgumentError(f"{where}: data_offsets are missing or not two sizes")
    return offsets[0], offsets[1]


def _numbers(raw: memoryview, dtype: str, where: str) -> Float32s | Int64s:
    if dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        floats = wide.view(np.float32)
    elif dtype.startswith("F"):
        floats = np.frombuffer(raw, _NUMPY[dtype]).astype(np.float32)
    else:
        return np.frombuffer(raw, _NUMPY[dtype]).astype(np.int64)
    if floats.size and not (np.isfinite(floats.min()) and np.isfinite(floats.max())):
        raise InvalidArgumentError(f"{where}: holds NaN or infinite values; only finite ones are allowed")
    return floats
