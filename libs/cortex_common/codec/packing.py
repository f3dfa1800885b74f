"""The outer shape of a chunk's plaintext: the encoded body, lz4-packed where that helps, and one tag byte at the end.

The tag is last so that the numbers of an unpacked body stay aligned.
"""

from __future__ import annotations

from typing import Literal

import lz4.block

from cortex_common.errors import CorruptError

Lz4Mode = Literal["auto", "on", "off"]

_RAW = 0
_LZ4 = 1
_WORTH_IT = 1.05
_SAMPLE = 16 * 1024


def pack(room: memoryview, mode: Lz4Mode) -> bytes | memoryview:
    """Finish a chunk.

    Args:
        room: Encoded numbers, and one byte more for the tag. It is what is returned, unless packing pays.
        mode: `auto` packs when a sample and then the whole shrink by more than 5 %, `on` tries the whole at once,
            `off` never packs.
    """
    body = room[:-1]
    if mode == "on" or (mode == "auto" and _sample_shrinks(body)):
        packed: bytes = lz4.block.compress(body, store_size=False)
        if len(packed) * _WORTH_IT < len(body):
            return packed + bytes((_LZ4,))
    room[-1] = _RAW
    return room


def unpack(payload: memoryview, body_bytes: int) -> memoryview:
    """The body of a chunk; its length is known in advance, so nothing larger is ever allocated.

    Raises:
        CorruptError: unknown tag or another length.
    """
    tag = payload[-1] if len(payload) else None
    packed = payload[:-1]
    if tag == _RAW and len(packed) == body_bytes:
        return packed
    if tag == _LZ4 and len(packed) < body_bytes:
        try:
            body = lz4.block.decompress(packed, uncompressed_size=body_bytes)
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as exc:
            raise CorruptError(f"chunk does not unpack to the {body_bytes} bytes it must hold") from exc
        if len(body) == body_bytes:
            return memoryview(body)
    raise CorruptError(
        f"chunk payload of {len(payload)} bytes (tag {tag}) does not hold the {body_bytes} bytes it must"
    )


def _sample_shrinks(body: memoryview) -> bool:
    if len(body) <= 4 * _SAMPLE:
        return True
    middle = len(body) // 2
    sample = bytes(body[:_SAMPLE]) + bytes(body[middle : middle + _SAMPLE]) + bytes(body[-_SAMPLE:])
    return len(lz4.block.compress(sample, store_size=False)) * _WORTH_IT < len(sample)
