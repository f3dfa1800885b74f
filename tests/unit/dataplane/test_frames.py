"""Frames written by hand are the bytes protobuf writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.ids import KeyId
from cortex_common.pb.v1 import aggregator_pb2, transfer_pb2
from cortex_common.security.objects import WrappedKey
from cortex_common.transfer import ChunkFrame, HeaderFrame, Receipt, TrailerFrame, frame_from_bytes, frame_to_bytes
from cortex_common.transfer.wire import data_key_from_proto, data_key_to_proto, receipt_from_proto, receipt_to_proto
from tests.unit.dataplane.test_encryption import HEADER

indices = st.integers(0, 2**32 - 1)


@given(indices, st.binary(max_size=300))
def test_a_chunk_is_written_as_protobuf_would(index: int, sealed: bytes) -> None:
    chunk = transfer_pb2.WeightChunk(index=index, sealed=sealed)
    frame = transfer_pb2.WeightFrame(chunk=chunk)
    data = frame_to_bytes(ChunkFrame(index, sealed))
    assert data == aggregator_pb2.PushUpdateRequest(frame=frame).SerializeToString()
    assert data == aggregator_pb2.PullModelResponse(frame=frame).SerializeToString()
    read = frame_from_bytes(data)
    assert isinstance(read, ChunkFrame)
    assert (read.index, bytes(read.sealed)) == (index, sealed)


def test_a_megabyte_chunk_is_read_without_a_copy() -> None:
    sealed = bytes(range(256)) * 4096
    read = frame_from_bytes(frame_to_bytes(ChunkFrame(7, sealed)))
    assert isinstance(read, ChunkFrame)
    assert isinstance(read.sealed, memoryview)
    assert read.sealed == sealed


def test_an_unusual_but_valid_encoding_is_read_too() -> None:
    chunk = b"\x12\x02ab" + b"\x08\x05"
    inner = b"\x12" + bytes((len(chunk),)) + chunk
    assert frame_from_bytes(b"\x0a" + bytes((len(inner),)) + inner) == ChunkFrame(5, b"ab")


def test_headers_and_trailers_survive() -> None:
    assert frame_from_bytes(frame_to_bytes(HeaderFrame(HEADER, 3))) == HeaderFrame(HEADER, 3)
    trailer = TrailerFrame(4, b"d" * 32)
    assert frame_from_bytes(frame_to_bytes(trailer)) == trailer


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        frame_from_bytes(data)
    except (CorruptError, InvalidArgumentError):
        return


@given(st.binary(max_size=40), st.integers(0, 60))
def test_a_cut_frame_is_refused(sealed: bytes, cut: int) -> None:
    data = frame_to_bytes(ChunkFrame(300, sealed + b"x"))
    if cut < len(data):
        with pytest.raises(CorruptError):
            frame_from_bytes(data[:cut])


def test_receipts_and_keys_survive() -> None:
    receipt = Receipt("job-1", 3, 1, 2, "w2", "ab" * 32, 12.5, 99, 7, newly_accepted=False)
    assert receipt_from_proto(receipt_to_proto(receipt)) == receipt
    key = WrappedKey(KeyId("k"), 3, bytes(range(80)))
    assert data_key_from_proto(data_key_to_proto(key)) == key


@pytest.mark.parametrize("change", [{"kind": 9}, {"salt": b"short"}, {"object_id": b""}])
def test_a_header_of_the_wrong_form_is_refused(change: dict[str, object]) -> None:
    proto = aggregator_pb2.PushUpdateRequest.FromString(frame_to_bytes(HeaderFrame(HEADER)))
    for name, value in change.items():
        setattr(proto.frame.header, name, value)
    with pytest.raises(InvalidArgumentError):
        frame_from_bytes(proto.SerializeToString())
