"""Uploads that are cut, repeated, damaged, hostile, or meet a full disk: over gRPC, and through a gateway."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from cortex_common.errors import (
    ConflictError,
    CorruptError,
    ForbiddenError,
    InvalidArgumentError,
    OverloadedError,
    UnavailableError,
)
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.security.encryption import EncryptionManager, ObjectHeader
from cortex_common.tensors import Arena, ChunkRange, Manifest, TensorKind, chunk_ranges
from cortex_common.transfer import PUSH_METHOD, ChunkFrame, HeaderFrame, TrailerFrame, frame_to_bytes, push_update
from cortex_common.transfer.content import chunk_digest, content_digest
from tests.integration.aggregator.harness import MANIFEST, Cluster, arena_of, encoder, running_cluster
from tests.integration.aggregator.ways import ThroughGateway, through_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")
TlsOf = Callable[..., TlsFiles]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["grpc", "websocket"])
async def way(
    request: pytest.FixtureRequest, tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ThroughGateway | None]:
    """Whatever an aggregator promises of uploads, it does for both transports."""
    if request.param == "grpc":
        yield None
        return
    async with through_gateway(tls_of, tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(way: ThroughGateway | None, tls_of: TlsOf, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tls_of, tmp_path / "state", way) as running:
        yield running


class RawUpload:
    """An upload by hand, frame by frame."""

    def __init__(self, cluster: Cluster, header: ObjectHeader, worker: str = "") -> None:
        channel = cluster.channel(Role.WORKER, worker or header.sender)
        self.call: Any = channel.stream_stream(
            PUSH_METHOD, response_deserializer=aggregator_pb2.PushUpdateResponse.FromString
        )()
        self.header = header

    async def begin(self) -> aggregator_pb2.Resume:
        with calling("aggregator"):
            await self.call.write(frame_to_bytes(HeaderFrame(self.header)))
            return (await self.call.read()).resume

    async def send(self, *chunks: ChunkFrame) -> None:
        for chunk in chunks:
            await self.call.write(frame_to_bytes(chunk))

    async def finish(self, sealed: list[bytes]) -> aggregator_pb2.PushUpdateResponse:
        digest = content_digest(chunk_digest(each) for each in sealed)
        with calling("aggregator"):
            await self.call.write(frame_to_bytes(TrailerFrame(len(sealed), digest)))
            return await self.call.read()

    async def error(self) -> None:
        with calling("aggregator"):
            await self.call.read()


def sealed_chunks(cluster: Cluster, header: ObjectHeader, arena: Arena) -> list[bytes]:
    encode, sealer = encoder(header, arena), cluster.encryption.sealer(header)
    parts = chunk_ranges(header.elements, header.counters, header.chunk_elements)
    return [sealer.seal(part.index, encode(part)) for part in parts]


async def until_received(cluster: Cluster, number: int, chunks: int) -> None:
    request = aggregator_pb2.WatchRoundRequest(job_id="job-1", round=number)
    async with asyncio.timeout(10):
        async for view in cluster.rounds.WatchRound(request):
            if view.seats[0].chunks_received >= chunks:
                return


@pytest_asyncio.fixture(loop_scope="module")
async def opened(cluster: Cluster) -> tuple[Cluster, str]:
    """A cluster in round 1 with one seat, and its base."""
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.open(1, sha256)
    return cluster, sha256


async def cut_after(cluster: Cluster, header: ObjectHeader, arena: Arena, count: int) -> None:
    upload = RawUpload(cluster, header)
    assert (await upload.begin()).first_chunk == 0
    sealed = sealed_chunks(cluster, header, arena)
    await upload.send(*(ChunkFrame(index, sealed[index]) for index in range(count)))
    await until_received(cluster, header.round, count)
    upload.call.cancel()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_cut_upload_sends_only_what_is_missing(opened: tuple[Cluster, str], restarted: bool) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    await cut_after(cluster, header, arena, 2)
    if restarted:
        await cluster.restart()
        await cluster.open(1, base)
    result = await cluster.push(header, arena)
    sealed = sealed_chunks(cluster, header, arena)
    assert sum(len(each) for each in sealed[2:]) <= result.bytes_up < sum(len(each) for each in sealed[2:]) + 100
    assert result.receipt.size_bytes == sum(len(each) for each in sealed)
    assert result.receipt.newly_accepted


async def test_what_a_power_cut_damaged_is_sent_again(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    await cut_after(cluster, header, arena, 2)
    await cluster.stop()
    update = cluster.spool(1) / "seat-0.update"
    with update.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(50))
    await cluster.start()
    await cluster.open(1, base)
    result = await cluster.push(header, arena)
    assert result.bytes_up > result.receipt.size_bytes - 2 * header.chunk_elements * 4
    assert (await cluster.seal(1, [result.receipt])).version.sha256


async def test_a_torn_chunk_is_cut_off_after_a_kill(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    await cut_after(cluster, header, arena, 2)
    await cluster.stop()
    chunks = cluster.spool(1) / "seat-0.update"
    with chunks.open("ab") as file:
        file.write((5000).to_bytes(4, "big") + b"torn")
    await cluster.start()
    await cluster.open(1, base)
    receipt = (await cluster.push(header, arena)).receipt
    assert (await cluster.seal(1, [receipt])).version.sha256


async def test_an_accepted_update_survives_a_restart_and_counts_once(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    first = await cluster.push(header, arena)
    await cluster.restart()
    again = await cluster.push(header, arena)
    assert again.bytes_up == 0
    assert again.receipt == replace(first.receipt, newly_accepted=False)
    other = await cluster.push(header.fresh(), arena_of(3))
    assert other.receipt == again.receipt
    sealed = await cluster.seal(1, [first.receipt])
    await cluster.restart()
    assert (await cluster.seal(1, [first.receipt])).version == sealed.version
    pulled = await cluster.pull(sealed.version.sha256)
    assert pulled.arena is not None
    np.testing.assert_allclose(pulled.arena.values, arena_of(1).values + arena.values, rtol=1e-6)


async def test_without_its_key_a_round_asks_to_retry(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    await cluster.restart()
    with pytest.raises(UnavailableError, match="not open yet"):
        await RawUpload(cluster, cluster.header(1, base)).begin()
    pushing = asyncio.create_task(cluster.push(cluster.header(1, base), arena_of(2)))
    await cluster.open(1, base)
    assert (await pushing).receipt.newly_accepted


async def test_another_object_replaces_a_partial_one(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    await cut_after(cluster, cluster.header(1, base), arena_of(2), 2)
    header = cluster.header(1, base)
    result = await cluster.push(header, arena_of(3))
    assert result.bytes_up > result.receipt.size_bytes


async def test_the_newer_of_two_streams_wins(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    older = RawUpload(cluster, header)
    await older.begin()
    await older.send(ChunkFrame(0, sealed_chunks(cluster, header, arena)[0]))
    await until_received(cluster, 1, 1)
    result = await cluster.push(header, arena)
    assert result.receipt.newly_accepted
    with pytest.raises(ConflictError, match="newer upload"):
        await older.error()


def flipped(sealed: bytes) -> bytes:
    return sealed[:7] + bytes((sealed[7] ^ 1,)) + sealed[8:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: [ChunkFrame(0, flipped(s[0]))], "chunk 0 .* does not open"),
        (lambda s: [ChunkFrame(0, s[0][:-1])], "chunk 0 .* does not open"),
        (lambda s: [ChunkFrame(0, s[0][:3])], "impossible length"),
        (lambda s: [ChunkFrame(0, s[0] + b"\0" * 10_000)], "at most"),
        (lambda s: [ChunkFrame(0, s[1])], "chunk 0 .* does not open"),
        (lambda s: [ChunkFrame(1, s[1])], "chunk 1 arrived where chunk 0 of 4 was due"),
        (lambda s: [ChunkFrame(0, s[0]), ChunkFrame(0, s[0])], "chunk 0 arrived where chunk 1"),
    ],
    ids=["flipped", "truncated", "tiny", "padded", "swapped", "reordered", "twice"],
)
async def test_a_damaged_chunk_is_refused_and_the_rest_kept(
    opened: tuple[Cluster, str], damage: Callable[[list[bytes]], list[ChunkFrame]], message: str
) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    upload = RawUpload(cluster, header)
    await upload.begin()
    await upload.send(*damage(sealed_chunks(cluster, header, arena)))
    with pytest.raises(CorruptError, match=message):
        await upload.error()
    assert (await cluster.push(header, arena)).receipt.newly_accepted


async def test_a_chunk_of_another_job_does_not_open(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header = cluster.header(1, base)
    other = replace(header, job_id="job-2")
    upload = RawUpload(cluster, header)
    await upload.begin()
    await upload.send(ChunkFrame(0, sealed_chunks(cluster, other, arena_of(2))[0]))
    with pytest.raises(CorruptError, match="does not open"):
        await upload.error()


async def test_a_wrong_digest_discards_the_update(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    sealed = sealed_chunks(cluster, header, arena)
    upload = RawUpload(cluster, header)
    await upload.begin()
    await upload.send(*(ChunkFrame(index, each) for index, each in enumerate(sealed)))
    with pytest.raises(CorruptError, match="digest"):
        await upload.finish([*sealed[:-1], b"other"])
    assert not list(cluster.spool(1).glob("seat-0.*"))
    early = RawUpload(cluster, header)
    await early.begin()
    with pytest.raises(CorruptError, match="0 of 4 are here"):
        await early.finish(sealed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_is_refused_on_arrival(opened: tuple[Cluster, str], bad: float) -> None:
    cluster, base = opened
    header, arena = cluster.header(1, base), arena_of(2)
    arena.values[1500] = bad
    with pytest.raises(InvalidArgumentError, match="NaN or infinite"):
        await cluster.push(header, arena)
    header = cluster.header(1, base)
    sealer = cluster.encryption.sealer(header)
    upload = RawUpload(cluster, header)
    await upload.begin()
    for index in (0, 1):
        payload = arena.values[1024 * index : 1024 * (index + 1)].tobytes() + b"\0"
        await upload.send(ChunkFrame(index, sealer.seal(index, payload)))
    with pytest.raises(InvalidArgumentError, match=r"chunk 1 \(elements 1024 to 2047\): .*NaN"):
        await upload.error()
    assert (await cluster.view(1)).seats[0].chunks_received == 1


async def test_a_refusal_in_the_middle_of_a_long_upload_reaches_the_sender(cluster: Cluster) -> None:
    wide = Manifest.of([("w", (1_000_000,), TensorKind.TRAINABLE)])
    await cluster.open(0)
    header, arena = cluster.header(0, manifest=wide), Arena.zeros(wide)
    encode = encoder(header, arena)

    def poisoned(part: ChunkRange) -> bytes | bytearray:
        return np.full(1024, np.nan, np.float32).tobytes() + b"\0" if part.index == 30 else encode(part)

    channel = cluster.channel(Role.WORKER, "w0")
    with pytest.raises(InvalidArgumentError, match=r"chunk 30 .*NaN"):
        await push_update(lambda: channel, header, poisoned, cluster.encryption)


async def test_a_header_that_declares_a_terabyte_is_refused_before_anything_is_stored(cluster: Cluster) -> None:
    await cluster.open(0)
    huge = MANIFEST.to_json().replace(b"[50,60]", b"[1000000,1000000]")
    header = cluster.header(0)
    ends = b'"offset":3000'
    huge = huge.replace(ends, b'"offset":1000000000000').replace(b'"offset":3061', b'"offset":1000000000061')
    big = replace(header, manifest=huge, elements=10**12, chunks=10**9)
    with pytest.raises(InvalidArgumentError, match="4000000000292 bytes; at most"):
        await RawUpload(cluster, big).begin()
    with pytest.raises(InvalidArgumentError, match=r"header.elements: 1000000000000 given; this layout has 3071"):
        await RawUpload(cluster, replace(header, elements=10**12)).begin()
    assert not list(cluster.spool(0).glob("seat-*"))


async def test_everything_wrong_in_a_header_is_listed_at_once(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    header = replace(
        cluster.header(1, base), codec="int8", fence=9, network="other", chunk_elements=512, weight=float("nan")
    )
    with pytest.raises(InvalidArgumentError) as caught:
        await RawUpload(cluster, header).begin()
    paths = {violation.path for violation in caught.value.violations}
    assert paths >= {f"header.{name}" for name in ("codec", "fence", "network", "chunk_elements", "weight")}


async def test_a_seat_belongs_to_its_worker(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    with pytest.raises(ForbiddenError, match="belongs to 'w0', not to 'w9'"):
        await RawUpload(cluster, replace(cluster.header(1, base), sender="w9"), "w9").begin()
    with pytest.raises(ForbiddenError, match="only send its own"):
        await RawUpload(cluster, cluster.header(1, base), "w9").begin()
    with pytest.raises(ForbiddenError, match="no such seat"):
        await RawUpload(cluster, cluster.header(1, base, seat=3), "w3").begin()


async def test_a_silent_upload_is_ended(way: ThroughGateway | None, tls_of: TlsOf, tmp_path: Path) -> None:
    async with running_cluster(tls_of, tmp_path / "state", way, stream_idle_s=0.05) as cluster:
        await cluster.open(0)
        upload = RawUpload(cluster, cluster.header(0))
        await upload.begin()
        with pytest.raises(UnavailableError, match=r"nothing for 0\.05 s"):
            await upload.error()


async def test_a_full_disk_refuses_the_update_and_leaves_nothing(
    cluster: Cluster, file_size_limit: Callable[[int], None]
) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base, seats=2)
    kept = (await cluster.push(cluster.header(1, base, 1), arena_of(2))).receipt
    header = cluster.header(1, base)
    sealed = sealed_chunks(cluster, header, arena_of(3))
    upload = RawUpload(cluster, header)
    await upload.begin()
    file_size_limit(6000)
    await upload.send(*(ChunkFrame(index, each) for index, each in enumerate(sealed[:2])))
    with pytest.raises(OverloadedError, match=r"1-0: no room for 4117 bytes, \d+ are free"):
        await upload.error()
    file_size_limit(resource.RLIM_INFINITY)
    assert not list(cluster.spool(1).glob("seat-0.*"))
    assert (await cluster.view(1)).seats[1].receipt.content_sha256 == kept.content_sha256
    assert (await cluster.push(header, arena_of(3))).receipt.newly_accepted


async def test_an_update_that_cannot_fit_is_refused_before_its_first_chunk(
    way: ThroughGateway | None, tls_of: TlsOf, tmp_path: Path
) -> None:
    async with running_cluster(tls_of, tmp_path / "state", way, disk_reserve_bytes=1 << 60) as cluster:
        await cluster.open(0)
        with pytest.raises(OverloadedError, match=r"state/spool/job-1/0-0: \d+ bytes are needed, \d+ are free"):
            await RawUpload(cluster, cluster.header(0)).begin()


async def test_nothing_readable_of_an_update_or_a_key_lies_on_the_disk(opened: tuple[Cluster, str]) -> None:
    cluster, base = opened
    arena = arena_of(2)
    await cluster.push(cluster.header(1, base), arena)
    needles = (cluster.key.key, cluster.key.key.hex().encode(), arena.values[:16].tobytes())
    stored = [path.read_bytes() for path in cluster.settings.state_dir.rglob("*") if path.is_file()]
    assert stored
    assert not any(needle in data for needle in needles for data in stored)
    assert isinstance(cluster.encryption, EncryptionManager)
