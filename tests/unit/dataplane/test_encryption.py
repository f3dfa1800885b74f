"""Sealing: nothing but the very object, whole and in order, opens."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind

KEY = DataKey("key-1", 1, bytes(range(32)))
HEADER = ObjectHeader(
    kind=ObjectKind.UPDATE,
    network="cortex",
    job_id="job-1",
    round=3,
    attempt=0,
    fence=2,
    sender="w1",
    seat=1,
    key_id="key-1",
    codec="int8",
    codec_options='{"block":256}',
    chunk_elements=1024,
    elements=3000,
    counters=1,
    chunks=4,
    manifest_sha256="ab",
    base_sha256="cd",
    manifest=b'{"tensors":[]}',
    weight=0.1,
    object_id=b"i" * 16,
    salt=b"s" * 32,
)
MANAGER = EncryptionManager(KEY)
PLAIN = [b"first", b"", b"third" * 300, b"last"]
SEALED = [MANAGER.sealer(HEADER).seal(index, plain) for index, plain in enumerate(PLAIN)]


def test_an_object_opens_and_sealing_again_gives_the_same_bytes() -> None:
    opener = MANAGER.opener(HEADER)
    assert [opener.open(index, sealed) for index, sealed in enumerate(SEALED)] == PLAIN
    scratch = bytearray(2000)
    assert [bytes(opener.open_into(index, sealed, scratch)) for index, sealed in enumerate(SEALED)] == PLAIN
    out = bytearray(len(SEALED[2]))
    assert MANAGER.sealer(HEADER).seal_into(2, PLAIN[2], out) == len(out)
    assert bytes(out) == SEALED[2]


@given(st.integers(0, 3), st.data())
def test_any_flipped_byte_is_found(index: int, data: st.DataObject) -> None:
    sealed = bytearray(SEALED[index])
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptError, match=f"chunk {index} of the update of job job-1 round 3 by w1 does not open"):
        MANAGER.opener(HEADER).open(index, bytes(sealed))


@given(st.integers(0, 3), st.data())
def test_a_truncated_chunk_is_found(index: int, data: st.DataObject) -> None:
    cut = SEALED[index][: data.draw(st.integers(0, len(SEALED[index]) - 1))]
    opener = MANAGER.opener(HEADER)
    with pytest.raises(CorruptError):
        opener.open_into(index, cut, bytearray(2000))
    with pytest.raises(CorruptError):
        opener.open(index, cut)


def test_chunks_open_only_at_their_place() -> None:
    opener = MANAGER.opener(HEADER)
    for index in range(4):
        for other in {0, 1, 2, 3} - {index}:
            with pytest.raises(CorruptError):
                opener.open(index, SEALED[other])
    with pytest.raises(CorruptError, match="chunk 4 of an object with 4 chunks"):
        opener.open(4, SEALED[3])


OTHER = {
    "kind": ObjectKind.MODEL,
    "network": "other",
    "job_id": "job-2",
    "round": 4,
    "attempt": 1,
    "fence": 3,
    "sender": "w2",
    "seat": 2,
    "codec": "none",
    "codec_options": "",
    "chunk_elements": 2048,
    "elements": 3001,
    "counters": 0,
    "chunks": 5,
    "manifest_sha256": "ba",
    "base_sha256": "dc",
    "manifest": b"",
    "weight": 0.2,
    "object_id": b"j" * 16,
    "salt": b"t" * 32,
}


def test_every_field_of_the_header_is_bound_but_the_model_digest() -> None:
    assert {item.name for item in fields(ObjectHeader)} - OTHER.keys() == {"key_id", "model_sha256"}


@pytest.mark.parametrize("name", OTHER)
def test_a_chunk_spliced_into_another_object_does_not_open(name: str) -> None:
    with pytest.raises(CorruptError):
        MANAGER.opener(replace(HEADER, **{name: OTHER[name]})).open(0, SEALED[0])


def test_a_shortened_object_does_not_end() -> None:
    with pytest.raises(CorruptError):
        MANAGER.opener(replace(HEADER, chunks=3)).open(2, SEALED[2])


def test_another_key_does_not_open_and_a_missing_one_is_named() -> None:
    with pytest.raises(CorruptError):
        EncryptionManager(replace(KEY, key=b"k" * 32)).opener(HEADER).open(0, SEALED[0])
    with pytest.raises(NotFoundError, match="data key key-1 of job job-1 is not here"):
        EncryptionManager().opener(HEADER)
    with pytest.raises(InvalidArgumentError, match="another key has this id"):
        EncryptionManager(KEY).add(replace(KEY, key=b"k" * 32))


def test_fresh_headers_differ_and_bare_ones_are_refused() -> None:
    one, two = HEADER.fresh(), HEADER.fresh()
    assert one.salt != two.salt
    assert one.object_id != two.object_id
    with pytest.raises(InvalidArgumentError, match="16-byte id"):
        MANAGER.sealer(replace(HEADER, salt=b""))


def test_headers_survive_as_facts() -> None:
    assert ObjectHeader.from_facts(HEADER.to_facts()) == HEADER
    with pytest.raises(CorruptError):
        ObjectHeader.from_facts({"kind": "update"})


def test_keys_do_not_show() -> None:
    assert "key=" not in repr(KEY).replace("key_id=", "")
    assert EncryptionManager.new_data_key() != EncryptionManager.new_data_key()
    with pytest.raises(InvalidArgumentError, match="32 bytes"):
        DataKey("k", 1, b"short")
