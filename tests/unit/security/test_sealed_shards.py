"""Sealed data sets: what the manifest says is what opens, whole and in its place, or nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import BYTES
from cortex_common.data.partition import Partition, partition
from cortex_common.data.sealed import Described, dataset_of, described, shards_of_seat
from cortex_common.envelope import Envelope
from cortex_common.errors import AlreadyExistsError, CorruptError, ForbiddenError, InvalidArgumentError
from cortex_common.security.objects import DataKey
from cortex_common.security.shards import (
    ShardIntake,
    check_signature,
    header_of,
    seal_dataset,
    sealed_size,
    shard_file,
    shard_key,
)
from cortex_common.security.signing import SigningKey
from services.worker.opened_shards import OpenedShards

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GENERATOR = np.random.default_rng(1)
INPUTS = GENERATOR.integers(0, 256, (1000, 9, 500), np.uint8)
"""4.5 MB: a shard of a third has two chunks."""
LABELS = GENERATOR.integers(0, 4, 1000, np.int64)
DATASET = Dataset(DatasetInfo("any", (9, 500), 4, 1000), INPUTS, LABELS, BYTES)
PARTS = partition(LABELS, Partition(), 3)


class Sealed:
    """A data set that was sealed, as its folder and its key."""

    def __init__(self, folder: Path, name: str = "ward-7") -> None:
        self.signer = SigningKey.create(folder / f"{name}.key")
        self.folder = folder / name
        self.told, self.key = seal_dataset(name, DATASET, PARTS, self.signer, self.folder, NOW)
        self.manifest = self.told.manifest

    def chunks(self, index: int) -> list[bytes]:
        header, data = header_of(self.manifest, index), (self.folder / shard_file(index)).read_bytes()
        cuts = [sealed_size(header, chunk) for chunk in range(header.chunks)]
        assert len(data) == sum(cuts)
        return [data[sum(cuts[:chunk]) : sum(cuts[: chunk + 1])] for chunk in range(len(cuts))]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    return Sealed(tmp_path_factory.mktemp("sealed"))


def opened(sealed: Sealed, index: int, chunks: list[bytes], key: DataKey | None = None) -> bytearray:
    memory = bytearray(sealed.manifest.shard_bytes(index))
    intake = ShardIntake(sealed.manifest, index, key or shard_key(sealed.key, index), memoryview(memory))
    for number, chunk in enumerate(chunks):
        intake.take(number, chunk)
    intake.finish()
    return memory


def test_shards_open_to_what_was_sealed(sealed: Sealed) -> None:
    check_signature(sealed.told)
    assert described(sealed.told.envelope.to_json()).reference == f"sealed:ward-7@{sealed.told.digest}"
    memory = b"".join(bytes(opened(sealed, index, sealed.chunks(index))) for index in (2, 0))
    dataset = dataset_of(sealed.manifest, (2, 0), memoryview(memory))
    order = np.concatenate([PARTS[2], PARTS[0]])
    inputs, labels = dataset.take(slice(None))
    wanted, told = DATASET.take(order)
    assert np.array_equal(inputs, wanted)
    assert np.array_equal(labels, told)


def test_nothing_readable_is_in_the_folder(sealed: Sealed) -> None:
    assert {path.name for path in sealed.folder.iterdir()} == {"manifest.json", *map(shard_file, range(3))}
    everything = b"".join(path.read_bytes() for path in sealed.folder.iterdir())
    for secret in (INPUTS[PARTS[1][5]].tobytes()[:32], sealed.key.key, sealed.key.key.hex().encode()):
        assert secret not in everything


@given(st.data())
def test_a_flipped_bit_anywhere_is_found(sealed: Sealed, data: st.DataObject) -> None:
    chunks = sealed.chunks(1)
    number = data.draw(st.integers(0, len(chunks) - 1))
    spoilt = bytearray(chunks[number])
    spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    chunks[number] = bytes(spoilt)
    with pytest.raises(CorruptError, match=f"chunk {number} of shard 1 of data set ward-7 does not open"):
        opened(sealed, 1, chunks)


def test_chunks_and_shards_that_are_moved_missing_or_of_another_data_set_are_refused(
    sealed: Sealed, tmp_path: Path
) -> None:
    first, second = sealed.chunks(0)
    other = Sealed(tmp_path)
    for chunks, told in (
        ([second, first], "does not open"),
        ([first, first], "does not open"),
        ([first], "1 of 2 chunks came"),
        ([first, second, second], "chunk 2 came where chunk 2 was due"),
        ([first[:-1], second], "does not open"),
        ([b"", second], "impossible length"),
        (sealed.chunks(1), "does not open"),
        (other.chunks(0), "does not open"),
    ):
        with pytest.raises(CorruptError, match=told):
            opened(sealed, 0, chunks)


def test_the_key_of_a_shard_opens_that_one_and_no_other(sealed: Sealed) -> None:
    own, another = shard_key(sealed.key, 0), shard_key(sealed.key, 1)
    with pytest.raises(InvalidArgumentError, match="is not its key"):
        opened(sealed, 0, sealed.chunks(0), another)
    for wrong in (another, sealed.key):
        with pytest.raises(CorruptError, match="does not open"):
            opened(sealed, 0, sealed.chunks(0), replace(wrong, key_id=own.key_id))


def test_a_manifest_is_its_owners_or_nobodys(sealed: Sealed, tmp_path: Path) -> None:
    payload = json.loads(sealed.told.envelope.payload)
    stranger = SigningKey.create(tmp_path / "stranger.key")
    changed = replace(sealed.told.envelope, payload=json.dumps(payload | {"classes": 5}).encode())
    for envelope in (changed, replace(changed, signatures=()), stranger.sign(replace(changed, signatures=()))):
        with pytest.raises(ForbiddenError, match="not signed by ed25519:"):
            check_signature(Described.of(envelope))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shards": []}, "shards"),
        ({"chunk_bytes": 1}, "chunk_bytes"),
        ({"input_type": "|O"}, "input_type"),
        ({"input_shape": [1 << 39, 1 << 39]}, "a shard is larger"),
        ({"more": 1}, "more"),
        ({"name": "../up"}, "name"),
    ],
)
def test_a_manifest_that_cannot_be_one_is_refused(sealed: Sealed, change: dict[str, object], told: str) -> None:
    payload = json.loads(sealed.told.envelope.payload) | change
    envelope = replace(sealed.told.envelope, payload=json.dumps(payload).encode())
    with pytest.raises(InvalidArgumentError, match=told):
        Described.of(envelope)
    with pytest.raises(InvalidArgumentError, match="payloadType"):
        Described.of(Envelope("text/plain", sealed.told.envelope.payload))


def test_a_folder_with_something_in_it_is_left_alone(sealed: Sealed) -> None:
    with pytest.raises(AlreadyExistsError, match="not empty"):
        seal_dataset("again", DATASET, PARTS, sealed.signer, sealed.folder, NOW)


def test_labels_that_the_manifest_does_not_allow_are_refused(sealed: Sealed) -> None:
    few = sealed.manifest.model_copy(update={"classes": 3})
    with pytest.raises(InvalidArgumentError, match="labels from 0 to 3; allowed: 0 to 2"):
        dataset_of(few, (0,), memoryview(opened(sealed, 0, sealed.chunks(0))))


@given(st.integers(1, 20), st.integers(1, 20))
def test_every_shard_goes_to_one_seat_and_every_seat_has_one(seats: int, more: int) -> None:
    count = seats + more - 1
    dealt = [list(shards_of_seat(seat, seats, count)) for seat in range(seats)]
    assert sorted(index for part in dealt for index in part) == list(range(count))
    assert all(dealt)


def test_opened_shards_are_wiped_also_for_who_still_looks_at_them() -> None:
    shards = OpenedShards("digest", "{}", (0, 1), 3 << 20)
    again = os.dup(shards.descriptor)
    shards.view[:] = b"\x55" * len(shards.view)
    looking = shards.view[5:10]
    assert shards.holds("digest", (0, 1))
    assert os.pread(again, 10, 0) == b"\x55" * 10
    shards.erase()
    shards.erase()
    assert not shards.holds("digest", (0, 1))
    assert bytes(looking) == bytes(5)
    assert not any(os.pread(again, 3 << 20, 0))
    os.close(again)
