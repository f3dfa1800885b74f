"""WeightCompressor: float32 ranges to compact chunk payloads and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from cortex_common.codec.blocks import Blocks
from cortex_common.codec.native import ready
from cortex_common.codec.packing import Lz4Mode, pack, unpack
from cortex_common.codec.quantisers import NO_ROOM, Accumulator, Bf16, Plain, Quantiser
from cortex_common.codec.rounding import NEAREST, Rounding
from cortex_common.codec.sparse import TopK
from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.job.codec_options import CODECS, CodecName, codec_violations, with_defaults
from cortex_common.tensors import ChunkRange, Float32s, Int64s

Payload = bytes | bytearray | memoryview
_MAX_OPTIONS = 4096


@dataclass(frozen=True, slots=True)
class WeightCompressor:
    """One codec with its options. Holds no buffers: threads may share it.

    A payload is the codec's body, lz4-packed where that pays, and one tag byte. The lz4 mode matters to the
    sender only.

    >>> import numpy as np
    >>> from cortex import WeightCompressor
    >>> codec = WeightCompressor.create("int8")
    >>> values = np.linspace(-1, 1, 4096, dtype=np.float32)
    >>> payload = codec.encode(values)
    >>> len(payload) < values.nbytes / 3
    True
    >>> decoded = np.empty_like(values)
    >>> _ = codec.decode(payload, values.size, decoded)
    >>> bool(np.abs(decoded - values).max() < 0.01)
    True
    >>> WeightCompressor.create("int9")
    Traceback (most recent call last):
    cortex_common.errors.InvalidArgumentError: codec 'int9'; allowed are ...
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
        if codec not in CODECS:
            raise InvalidArgumentError(f"codec {codec!r}; allowed are {', '.join(CODECS)}")
        if lz4 not in get_args(Lz4Mode):
            raise InvalidArgumentError(f"lz4 {lz4!r}; allowed are {', '.join(get_args(Lz4Mode))}")
        if violations := codec_violations(codec, options or {}):
            raise InvalidArgumentError.of(f"codec {codec}", violations)
        quantiser = _quantiser(codec, with_defaults(codec, options or {}))
        text = json.dumps(quantiser.options(), sort_keys=True, separators=(",", ":"))
        return cls(quantiser, text, cast(Lz4Mode, lz4))

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

    def encode(self, values_n: Float32s, *, seed: int = 0, residual_n: Float32s | None = None) -> bytes | bytearray:
        """The payload of a range of values, in memory of its own. See `encode_into`."""
        room = bytearray(self.quantiser.body_bytes(values_n.size) + 1)
        payload = self.encode_into(values_n, room, seed=seed, residual_n=residual_n)
        return payload if isinstance(payload, bytes) else room

    def encode_into(
        self,
        values_n: Float32s,
        out: bytearray | memoryview,
        *,
        seed: int = 0,
        residual_n: Float32s | None = None,
    ) -> bytes | memoryview:
        """The payload of a range of values, written to memory that is used again: fresh pages cost as much as coding.

        Args:
            values_n: float32, shape (n,).
            out: At least `max_payload_bytes`. The payload is the first part of it, or its own bytes where lz4 pays.
            seed: Decides stochastic rounding, and nothing else; see `rounding_seed`. The same values and seed give
                the same bytes.
            residual_n: Gets the values minus what the payload decodes to, float32, shape (n,). May be the memory of
                `values_n` itself, or none of it. After an error its content is undefined.

        Raises:
            InvalidArgumentError: a value is not finite, or the residual or `out` has too little room.
        """
        if residual_n is not None and residual_n.size != values_n.size:
            raise InvalidArgumentError(f"residual of {residual_n.size} elements for {values_n.size} values")
        size = self.quantiser.body_bytes(values_n.size)
        if len(out) <= size:
            raise InvalidArgumentError(f"{len(out)} bytes of room for a payload of up to {size + 1}")
        rounding = Rounding.of(seed, is_stochastic=True) if self.quantiser.stochastic else NEAREST
        left_n = NO_ROOM if residual_n is None else residual_n
        room = memoryview(out)[: size + 1]
        self.quantiser.encode(values_n, room[:size], rounding, left_n, ready(self.quantiser.key))
        return pack(room, self.lz4)

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
        kernels = ready(self.quantiser.key)
        self.quantiser.check(body, elements, kernels)
        self.quantiser.decode(body, out_n, kernels)
        return out_n

    def decode_add(self, payload: Payload, total_n: Accumulator, weight: float) -> None:
        """Add weight times the values of a payload to an accumulator, float64 or float32.

        Product and sum are made in float64, then rounded to the accumulator's type: the same bits on every machine.

        Raises:
            CorruptError: wrong length or packing.
            InvalidArgumentError: a value is not finite.
        """
        body = self._body(payload, total_n.size)
        kernels = ready(self.quantiser.key)
        self.quantiser.check(body, total_n.size, kernels)
        self.quantiser.add(body, total_n, weight, kernels)

    def encode_counters(self, counters_c: Int64s) -> bytes | bytearray:
        """The payload of the exact section."""
        room = bytearray(counters_c.astype("<i8", copy=False).tobytes() + b"\0")
        payload = pack(memoryview(room), self.lz4)
        return payload if isinstance(payload, bytes) else room

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
            self.quantiser.check(body, chunk.elements, ready(self.quantiser.key))

    def _body_bytes(self, chunk: ChunkRange) -> int:
        return 8 * chunk.elements if chunk.is_counters else self.quantiser.body_bytes(chunk.elements)

    def _body(self, payload: Payload, elements: int) -> memoryview:
        return unpack(memoryview(payload), self.quantiser.body_bytes(elements))


def _quantiser(codec: CodecName, options: Mapping[str, Any]) -> Quantiser:
    match codec:
        case "none":
            return Plain()
        case "bf16":
            return Bf16()
        case "topk":
            return TopK(**options)
        case _:
            return Blocks(127 if codec == "int8" else 7, **options)
