"""The layout of a model: which tensor lies where in the flat buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any

from cortex_common.errors import InvalidArgumentError
from cortex_common.ids import Sha256Hex

_KEYS = {"dtype", "kind", "name", "offset", "shape"}
_MAX_NAME = 512
_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 48


class TensorKind(StrEnum):
    """How a tensor is treated when updates are combined."""

    TRAINABLE = "trainable"
    """Changed by the optimiser: averaged."""
    BUFFER = "buffer"
    """Floating state beside the parameters, for example batch-norm statistics: averaged too."""
    COUNTER = "counter"
    """Integers: travel exactly, the maximum is taken."""


@dataclass(frozen=True, slots=True)
class ManifestLimits:
    """What a manifest from somebody else may hold."""

    max_bytes: int = 1 << 20
    max_tensors: int = 20_000
    max_model_bytes: int = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor. `offset` counts elements from the start of its section (fp32 or int64)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: TensorKind
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds; 1 for a scalar."""
        return prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model in the order of its state dict.

    Raises:
        InvalidArgumentError: a name is empty, too long or used twice, a shape is impossible, or the tensors of a
            section do not follow one another without gap or overlap.
    """

    entries: tuple[TensorEntry, ...]
    elements: int = field(init=False)
    """Length of the fp32 section (D)."""
    counters: int = field(init=False)
    """Length of the int64 section (C)."""

    def __post_init__(self) -> None:
        """Check the layout and add up the sections."""
        ends = {"F32": 0, "I64": 0}
        names: set[str] = set()
        for entry in self.entries:
            _check_entry(entry, ends)
            if entry.name in names:
                raise InvalidArgumentError(f"tensor {entry.name!r} is in the manifest twice")
            names.add(entry.name)
            ends[entry.dtype] += entry.elements
        object.__setattr__(self, "elements", ends["F32"])
        object.__setattr__(self, "counters", ends["I64"])
        if self.elements + self.counters == 0:
            raise InvalidArgumentError("the manifest holds no numbers; allowed is a model with at least one")
        if self.elements + self.counters > _MAX_ELEMENTS:
            raise InvalidArgumentError(
                f"the manifest holds {self.elements + self.counters} numbers; at most {_MAX_ELEMENTS} are allowed"
            )

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Sequence[int], TensorKind]]) -> Manifest:
        """Lay out tensors, given as (name, shape, kind), one after another."""
        ends = {"F32": 0, "I64": 0}
        entries = []
        for name, shape, kind in tensors:
            dtype = "I64" if kind is TensorKind.COUNTER else "F32"
            entries.append(TensorEntry(name, tuple(int(size) for size in shape), dtype, kind, ends[dtype]))
            ends[dtype] += max(entries[-1].elements, 0)
        return cls(tuple(entries))

    @cached_property
    def parameters(self) -> int:
        """Numbers that are averaged: trainable ones and buffers."""
        return self.elements

    @property
    def model_bytes(self) -> int:
        """Bytes of both sections."""
        return 4 * self.elements + 8 * self.counters

    @cached_property
    def canonical(self) -> bytes:
        """The one JSON text of this layout: sorted keys, no white space."""
        tensors = [
            {"dtype": e.dtype, "kind": e.kind.value, "name": e.name, "offset": e.offset, "shape": list(e.shape)}
            for e in self.entries
        ]
        return json.dumps({"tensors": tensors}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def to_json(self) -> bytes:
        """Canonical JSON; equal layouts give equal bytes."""
        return self.canonical

    @cached_property
    def sha256(self) -> Sha256Hex:
        """Digest of the canonical JSON."""
        return Sha256Hex(hashlib.sha256(self.canonical).hexdigest())

    @classmethod
    def from_json(cls, data: bytes, limits: ManifestLimits = ManifestLimits()) -> Manifest:
        """Read a manifest that somebody else wrote.

        Raises:
            InvalidArgumentError: too large, not canonical, or an impossible layout.
        """
        if len(data) > limits.max_bytes:
            raise InvalidArgumentError(f"manifest of {len(data)} bytes; at most {limits.max_bytes} are allowed")
        try:
            document = json.loads(data)
            raw = document["tensors"]
            if not isinstance(raw, list) or len(raw) > limits.max_tensors:
                raise InvalidArgumentError(f"manifest: at most {limits.max_tensors} tensors are allowed")
            manifest = cls(tuple(_entry(item) for item in raw))
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise InvalidArgumentError(f"manifest is not valid: {exc}") from exc
        if manifest.canonical != bytes(data):
            raise InvalidArgumentError("manifest is not in canonical form (sorted keys, no white space, no extra keys)")
        if manifest.model_bytes > limits.max_model_bytes:
            raise InvalidArgumentError(
                f"the model has {manifest.model_bytes} bytes; at most {limits.max_model_bytes} are allowed here"
            )
        return manifest

    def safetensors_header(self) -> bytes:
        """The first bytes of the model's safetensors file: length and JSON.

        Nothing in it depends on the job, so equal weights give equal files. It is padded with spaces so that the int64
        section, which follows the fp32 one, starts at a multiple of 8: torch refuses to view it otherwise.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for entry in self.entries:
            start = entry.offset * 4 if entry.dtype == "F32" else 4 * self.elements + entry.offset * 8
            width = 4 if entry.dtype == "F32" else 8
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.elements * width],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        wanted = 4 if self.counters and self.elements % 2 else 0
        text += b" " * ((wanted - len(text)) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Length of the safetensors file."""
        return len(self.safetensors_header()) + self.model_bytes


def _check_entry(entry: TensorEntry, ends: Mapping[str, int]) -> None:
    if not 0 < len(entry.name) <= _MAX_NAME or entry.name == "__metadata__":
        raise InvalidArgumentError(
            f"tensor name {entry.name[:40]!r}: allowed are 1 to {_MAX_NAME} characters, not '__metadata__'"
        )
    if any(ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in entry.name):
        raise InvalidArgumentError(
            f"tensor name {entry.name[:40]!r}: control characters and surrogates are not allowed"
        )
    if len(entry.shape) > _MAX_DIMENSIONS or any(not 0 <= size <= _MAX_ELEMENTS for size in entry.shape):
        raise InvalidArgumentError(f"tensor {entry.name!r}: shape {list(entry.shape)[:8]} is impossible")
    if entry.elements > _MAX_ELEMENTS:
        raise InvalidArgumentError(
            f"tensor {entry.name!r}: shape {list(entry.shape)[:8]} holds more than {_MAX_ELEMENTS} numbers"
        )
    dtype = "I64" if entry.kind is TensorKind.COUNTER else "F32"
    if entry.dtype != dtype:
        raise InvalidArgumentError(f"tensor {entry.name!r}: dtype {entry.dtype!r}; a {entry.kind.value} is {dtype}")
    if entry.offset != ends[dtype]:
        raise InvalidArgumentError(
            f"tensor {entry.name!r}: offset {entry.offset}; without gap or overlap it is {ends[dtype]}"
        )


def _entry(item: object) -> TensorEntry:
    if not isinstance(item, dict) or item.keys() != _KEYS:
        raise ValueError(f"each tensor has exactly the keys {sorted(_KEYS)}")
    shape, offset, name, dtype = item["shape"], item["offset"], item["name"], item["dtype"]
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError("name and dtype are texts, shape is a list")
    if any(type(number) is not int for number in (*shape, offset)):
        raise ValueError(f"tensor {name[:40]!r}: shape and offset are whole numbers")
    return TensorEntry(name, tuple(shape), dtype, TensorKind(item["kind"]), offset)
