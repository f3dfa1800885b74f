"""Weight frames to bytes and back.

Protobuf objects would copy a chunk's sealed bytes three times, which costs half of an upload's CPU. So chunks are
written and read by hand here, as the same wire bytes (a test compares them); the rest goes through protobuf.
PushUpdateRequest and PullModelResponse hold nothing but the frame, in field 1, so both have this form.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from cortex_common.errors import CorruptError
from cortex_common.pb.v1 import aggregator_pb2, transfer_pb2
from cortex_common.security.encryption import ObjectHeader
from cortex_common.transfer.wire import header_from_proto, header_to_proto

_FRAME = 0x0A
_CHUNK = 0x12
_INDEX = 0x08
_SEALED = 0x12


@dataclass(frozen=True, slots=True)
class HeaderFrame:
    """What follows, and from which chunk on."""

    header: ObjectHeader
    first_chunk: int = 0


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """One sealed chunk."""

    index: int
    sealed: bytes | memoryview


@dataclass(frozen=True, slots=True)
class TrailerFrame:
    """The end: number of chunks, SHA-256 over the authentication tag of each."""

    chunks: int
    content_sha256: bytes


Frame = HeaderFrame | ChunkFrame | TrailerFrame


def frame_to_bytes(frame: Frame) -> bytes:
    """The message PushUpdateRequest or PullModelResponse with this frame."""
    if isinstance(frame, ChunkFrame):
        return b"".join((chunk_head(frame.index, len(frame.sealed)), frame.sealed))
    if isinstance(frame, HeaderFrame):
        proto = transfer_pb2.WeightFrame(header=header_to_proto(frame.header, frame.first_chunk))
    else:
        trailer = transfer_pb2.TransferTrailer(chunks=frame.chunks, content_sha256=frame.content_sha256)
        proto = transfer_pb2.WeightFrame(trailer=trailer)
    return aggregator_pb2.PushUpdateRequest(frame=proto).SerializeToString()


def chunk_head(index: int, sealed_bytes: int) -> bytes:
    """What stands before the sealed bytes of a chunk in its message: who makes them in place saves a copy."""
    own = bytes((_INDEX,)) + _varint(index) if index else b""
    head = own + bytes((_SEALED,)) + _varint(sealed_bytes) if sealed_bytes else own
    chunk = bytes((_CHUNK,)) + _varint(len(head) + sealed_bytes) + head
    return bytes((_FRAME,)) + _varint(len(chunk) + sealed_bytes) + chunk


def frame_from_bytes(data: bytes) -> Frame:
    """Read such a message; a chunk's bytes are a view of `data`.

    Raises:
        CorruptError: not a weight frame.
        InvalidArgumentError: the header's form is wrong.
    """
    chunk = _chunk_from_bytes(data)
    if chunk is not None:
        return chunk
    try:
        frame = aggregator_pb2.PushUpdateRequest.FromString(data).frame
    except DecodeError as exc:
        raise CorruptError("not a weight frame") from exc
    which = frame.WhichOneof("frame")
    if which == "header":
        return HeaderFrame(header_from_proto(frame.header), frame.header.first_chunk)
    if which == "chunk":
        return ChunkFrame(frame.chunk.index, frame.chunk.sealed)
    if which == "trailer":
        return TrailerFrame(frame.trailer.chunks, frame.trailer.content_sha256)
    raise CorruptError("an empty weight frame; allowed are header, chunk and trailer")


def _chunk_from_bytes(data: bytes) -> ChunkFrame | None:
    """The chunk when the message is written the usual way; None sends it to protobuf."""
    position, end = 0, len(data)
    for tag in (_FRAME, _CHUNK):
        if position >= end or data[position] != tag:
            return None
        length, position = _read_varint(data, position + 1)
        if length != end - position:
            return None
    index = 0
    if position < end and data[position] == _INDEX:
        index, position = _read_varint(data, position + 1)
    if position >= end or data[position] != _SEALED:
        return None
    length, position = _read_varint(data, position + 1)
    if length != end - position or index >= 1 << 32:
        return None
    return ChunkFrame(index, memoryview(data)[position:])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Value and next position; a value of -1 when it does not end."""
    value = shift = 0
    for index in range(position, min(position + 10, len(data))):
        value |= (data[index] & 0x7F) << shift
        if data[index] < 0x80:
            return value, index + 1
        shift += 7
    return -1, position
