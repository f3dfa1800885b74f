"""The blob store on a real S3 server: the suite of the directory, and what only a server can do."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest

from cortex_common.clock import SystemClock
from cortex_common.data import Partition, load, partition
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from cortex_common.security.shards import header_of, seal_dataset, sealed_size, shard_file
from cortex_common.security.signing import SigningKey
from cortex_common.storage.remote import S3Access, S3BlobStore
from cortex_common.transfer import ChunkFrame, HeaderFrame, TrailerFrame, frame_to_bytes
from cortex_common.transfer.content import chunk_digest, content_digest
from services.aggregator.incoming_shards import IncomingShards
from services.aggregator.shards import ShardStore
from tests.conformance.blob_store import BlobStoreConformance
from tests.integration.stores.servers import free_port


@pytest.fixture(scope="module")
def bucket(s3_server):
    access = S3Access(s3_server.endpoint, "us-east-1", s3_server.key_file, s3_server.secret_file)
    access.open().mkdir("tests")
    return access


@pytest.fixture
def store(bucket):
    return S3BlobStore(f"s3://tests/{uuid.uuid4().hex}", bucket)


class TestS3(BlobStoreConformance):
    """Objects."""


def test_a_blob_larger_than_a_part_is_whole(store):
    content = bytes(251) + bytes(range(251)) * (36 * 1024 * 1024 // 251)
    with store.create("large") as writer:
        writer.write(memoryview(content))
        writer.commit()
    with store.open("large") as reader:
        assert reader.size == len(content)
        assert reader.read_at(16 * 1024 * 1024 - 7, 14) == content[16 * 1024 * 1024 - 7 : 16 * 1024 * 1024 + 7]


def test_an_upload_given_up_leaves_nothing(store):
    with store.create("large") as writer:
        writer.write(bytes(20 * 1024 * 1024))
    assert list(store.names("")) == []


def test_a_reader_never_mixes_two_blobs_of_one_name(store):
    store.put("a", b"old!")
    with store.open("a") as reader:
        store.put("a", b"new!")
        with pytest.raises(CorruptError, match="replaced"):
            reader.read_at(0, 4)


def test_stores_of_other_prefixes_are_not_seen(bucket, store):
    store.put("a", b"x")
    assert list(S3BlobStore(f"s3://tests/{uuid.uuid4().hex}", bucket).names("")) == []


def test_a_server_that_is_away_is_told(tmp_path):
    store = S3BlobStore("s3://tests/x", S3Access(f"http://127.0.0.1:{free_port()}", "us-east-1", *_keys(tmp_path)))
    with pytest.raises(UnavailableError, match="does not answer"):
        store.open("a")


def test_wrong_keys_are_told(s3_server, tmp_path):
    store = S3BlobStore("s3://tests/x", S3Access(s3_server.endpoint, "us-east-1", *_keys(tmp_path)))
    with pytest.raises(UnavailableError, match="refuses"):
        store.put("a", b"x")


@pytest.mark.parametrize("url", ["tests/x", "file:///tmp", "s3://", "s3:///x", "s3://b/x?versionId=1"])
def test_addresses_of_other_things_are_refused(url):
    with pytest.raises(InvalidArgumentError, match="s3://bucket/prefix"):
        S3BlobStore(url, S3Access())


def test_a_missing_key_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        S3BlobStore("s3://b/x", S3Access(key_file=tmp_path / "nowhere"))


def shard_store(store, tmp_path):
    """An aggregator's, as after a start."""
    return ShardStore(store, IncomingShards(tmp_path / "incoming", 0, 60.0, SystemClock()), 30.0)


async def test_sealed_shards_are_kept_there_and_found_again_until_they_are_dropped(store, tmp_path):
    digits = load("digits", tmp_path)
    parts, key = partition(digits.labels, Partition(), 2), SigningKey.create(tmp_path / "ann.key")
    told, _ = seal_dataset("ward", digits, parts, key, tmp_path / "sealed", datetime.now(UTC))
    with pytest.raises(UnavailableError, match="ended before its trailer; it can be resumed"):
        await shard_store(store, tmp_path).put(
            _sent(tmp_path / "sealed" / shard_file(0), header_of(told.manifest, 0), ends=True)
        )
    assert list(store.names("")) == []
    shards = shard_store(store, tmp_path)
    assert (await shards.offer(header_of(told.manifest, 0))).chunks == 1
    for index in (0, 1):
        assert await shards.put(_sent(tmp_path / "sealed" / shard_file(index), header_of(told.manifest, index)))
    assert not await shards.put(_sent(tmp_path / "sealed" / shard_file(0), header_of(told.manifest, 0)))

    again = shard_store(store, tmp_path)
    for index, facts in enumerate(told.manifest.shards):
        part = again.part(facts.sha256)
        reader = again.open(part)
        chunks = b"".join(bytes(reader.read(chunk)) for chunk in range(part.header.chunks))
        reader.close()
        assert chunks == (tmp_path / "sealed" / shard_file(index)).read_bytes()
    assert list((tmp_path / "incoming").iterdir()) == []
    assert await again.drop([shard.sha256 for shard in told.manifest.shards]) == 2
    assert list(store.names("")) == []


async def _sent(path, header, *, ends=False):
    """A shard as an operator brings it; or its first chunk only."""
    yield frame_to_bytes(HeaderFrame(header))
    content, digests = path.read_bytes(), []
    for index in range(header.chunks):
        size = sealed_size(header, index)
        sealed, content = content[:size], content[size:]
        digests.append(chunk_digest(sealed))
        yield frame_to_bytes(ChunkFrame(index, sealed))
        if ends:
            return
    yield frame_to_bytes(TrailerFrame(header.chunks, content_digest(digests)))


def _keys(folder):
    (folder / "key").write_text("nobody")
    (folder / "secret").write_text("wrong")
    return folder / "key", folder / "secret"
