"""WeightCompressor: float32 ranges to compact chunk payloads and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec.packing import Lz4Mode, pack, unpack
from cortex_common.codec.quantisers import Int8Blocks, Plain, Quantiser
from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.tensors import ChunkRange, Float32s, Int64s

Payload = bytes | bytearray | memoryview
_MAX_OPTIONS = 4096


@dataclass(frozen=True, slots=True)
class WeightCompressor:
    """One codec with its options. Holds no buffers: threads may share it.

    A payload is the codec's body, lz4-packed where that pays, and one tag byte. The lz4 mode matters to the
    sender only.
    """

    quantiser: Quantiser
    options_json: str
    lz4: Lz4Mode = "auto"

    @classmethod
    def create(cls, codec: str, options: Mapping[str, Any] | None = None, lz4: str = "auto") -> WeightCompressor:
        """Build a codec by name.

        Raises:
            InvalidArgumentError: unknown codec, option or lz4 mode; the message says what is allowed.
        """
        options = dict(options or {})
        if codec not in _CODECS:
            raise InvalidArgumentError(f"codec {codec!r}; allowed are {', '.join(_CODECS)}")
        if lz4 not in get_args(Lz4Mode):
            raise InvalidArgumentError(f"lz4 {lz4!r}; allowed are {', '.join(get_args(Lz4Mode))}")
        quantiser = _CODECS[codec](options)
        if options:
            raise InvalidArgumentError(f"codec {codec}: unknown option {', '.join(sorted(options))}")
        text = json.dumps(_wire_options(quantiser), sort_keys=True, separators=(",", ":"))
        return cls(quantiser, text, lz4)  # type: ignore[arg-type]

    @classmethod
    def from_wire(cls, codec: str, options_json: str) -> WeightCompressor:
        """Build the codec a header names; empty options mean the defaults.

        Raises:
            InvalidArgumentError: unknown codec or options.
        """
        if len(options_json) > _MAX_OPTIONS:
            raise InvalidArgumentError(
                f"codec options of {len(options_json)} characters; at most {_MAX_OPTIONS} are allowed"
            )
        try:
            options = json.loads(options_json or "{}")
        except (ValueError, RecursionError) as exc:
            raise InvalidArgumentError(f"codec {codec}: options are not JSON") from exc
        if not isinstance(options, dict):
            raise InvalidArgumentError(f"codec {codec}: options are not a JSON object")
        return cls.create(codec, options)

    @property
    def codec(self) -> str:
        """The codec's name as it stands in a header."""
        return self.quantiser.name

    def max_payload_bytes(self, chunk: ChunkRange) -> int:
        """No payload of this range is longer."""
        return self._body_bytes(chunk) + 1

    def encode(self, values_n: Float32s) -> bytes | bytearray:
        """The payload of a range of values.

        Raises:
            InvalidArgumentError: a value is not finite.
        """
        body = bytearray(self.quantiser.body_bytes(values_n.size))
        view = memoryview(body)
        self.quantiser.encode(values_n, view)
        view.release()
        return pack(body, self.lz4)

    def decode(self, payload: Payload, elements: int, out_n: Float32s | None = None) -> Float32s:
        """The values of a payload, into `out_n` when given.

        Raises:
            CorruptError: wrong length or packing.
            InvalidArgumentError: a value is not finite.
        """
        body = self._body(payload, elements)
        out_n = np.empty(elements, np.float32) if out_n is None else out_n
        if out_n.size != elements:
            raise InvalidArgumentError(f"decoding {elements} elements into a range of {out_n.size}")
        self.quantiser.check(body, elements)
        self.quantiser.decode(body, out_n)
        return out_n

    def decode_add(self, payload: Payload, accumulator_n: NDArray[np.float64], weight: float) -> None:
        """Add weight times the values of a payload to an accumulator.

        Raises:
            CorruptError: wrong length or packing.
            InvalidArgumentError: a value is not finite.
        """
        body = self._body(payload, accumulator_n.size)
        self.quantiser.check(body, accumulator_n.size)
        self.quantiser.add(body, accumulator_n, weight)

    def encode_counters(self, counters_c: Int64s) -> bytes | bytearray:
        """The payload of the exact section."""
        return pack(bytearray(counters_c.astype("<i8", copy=False).data.cast("B")), self.lz4)

    def decode_counters(self, payload: Payload, counters: int) -> Int64s:
        """The integers of the exact section. CorruptError: wrong length or packing."""
        return np.frombuffer(unpack(memoryview(payload), 8 * counters), np.int64).copy()

    def check(self, payload: Payload, chunk: ChunkRange) -> None:
        """Whether a payload would decode to finite values of this range.

        Raises:
            CorruptError: wrong length or packing.
            InvalidArgumentError: a value is not finite.
        """
        if len(payload) > self.max_payload_bytes(chunk):
            raise CorruptError(f"chunk {chunk.index}: payload of {len(payload)} bytes is too long")
        body = unpack(memoryview(payload), self._body_bytes(chunk))
        if not chunk.is_counters:
            self.quantiser.check(body, chunk.elements)

    def _body_bytes(self, chunk: ChunkRange) -> int:
        return 8 * chunk.elements if chunk.is_counters else self.quantiser.body_bytes(chunk.elements)

    def _body(self, payload: Payload, elements: int) -> memoryview:
        return unpack(memoryview(payload), self.quantiser.body_bytes(elements))


def _plain(options: dict[str, Any]) -> Quantiser:
    return Plain()


def _int8(options: dict[str, Any]) -> Quantiser:
    block = options.pop("block", 256)
    if type(block) is not int or not 16 <= block <= 65536 or block & (block - 1):
        raise InvalidArgumentError(f"codec int8: block {block!r}; allowed is a power of two from 16 to 65536")
    return Int8Blocks(block)


def _wire_options(quantiser: Quantiser) -> dict[str, Any]:
    return {"block": quantiser.block} if isinstance(quantiser, Int8Blocks) else {}


_CODECS: dict[str, Callable[[dict[str, Any]], Quantiser]] = {"none": _plain, "int8": _int8}
CODECS = tuple(_CODECS)
