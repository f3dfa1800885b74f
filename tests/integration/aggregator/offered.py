"""A sealed shard and what an operator does with it: offer, send, drop, frame by frame or as `cortex data add` does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cortex.patience import Patience
from cortex.shipping import Cut, ship_shards
from cortex_common.clock import SystemClock
from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import Normalisation
from cortex_common.data.sealed import Described
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc
from cortex_common.rpc.errors import calling
from cortex_common.security.encryption import ObjectHeader
from cortex_common.security.shards import header_of, seal_dataset, sealed_bytes, shard_file
from cortex_common.security.signing import SigningKey
from cortex_common.transfer import ChunkFrame, Frame, HeaderFrame, TrailerFrame, frame_to_bytes
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.transfer.wire import header_to_proto
from tests.integration.aggregator.harness import Cluster
from tests.waiting import eventually

PUT = "/cortex.v1.ShardService/PutShard"
ANN = "ann"


@dataclass
class Shard:
    """The only shard of a data set, as its owner has it."""

    folder: Path
    told: Described

    @classmethod
    def of(cls, folder: Path, size_bytes: int, chunk_bytes: int = 1 << 20, seed: int = 0) -> Shard:
        """So many random bytes, sealed."""
        folder.mkdir(parents=True, exist_ok=True)
        row = 1016
        rows = -(-size_bytes // (row + 8))
        random = np.random.default_rng(seed)
        inputs, labels = random.integers(0, 256, (rows, row), np.uint8), random.integers(0, 10, rows)
        dataset = Dataset(DatasetInfo("ward", (row,), 10, rows), inputs, labels, Normalisation())
        key = SigningKey.create(folder / "ann.key")
        made = folder / "sealed"
        told, _ = seal_dataset(
            "ward", dataset, [np.arange(rows)], key, made, datetime.now(UTC), chunk_bytes=chunk_bytes
        )
        return cls(made, told)

    @property
    def header(self) -> ObjectHeader:
        return header_of(self.told.manifest, 0)

    @property
    def path(self) -> Path:
        return self.folder / shard_file(0)

    @property
    def size_bytes(self) -> int:
        return sealed_bytes(self.header, self.header.chunks)

    def chunks(self) -> list[bytes]:
        data, header = self.path.read_bytes(), self.header
        return [data[sealed_bytes(header, n) : sealed_bytes(header, n + 1)] for n in range(header.chunks)]

    def frames(self, first: int = 0, stop: int | None = None) -> list[Frame]:
        """The header and chunks of a range; the trailer too if there is no stop."""
        chunks = self.chunks()
        frames: list[Frame] = [HeaderFrame(self.header, first)]
        frames += [ChunkFrame(index, chunks[index]) for index in range(first, len(chunks) if stop is None else stop)]
        if stop is None:
            frames.append(TrailerFrame(len(chunks), content_digest(map(chunk_digest, chunks))))
        return frames


class RawPut:
    """A shard by hand, frame by frame."""

    def __init__(self, cluster: Cluster) -> None:
        method = cluster.channel(Role.OPERATOR, ANN).stream_unary(
            PUT, response_deserializer=aggregator_pb2.PutShardResponse.FromString
        )
        self.call: Any = method()

    async def send(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            await self.call.write(frame_to_bytes(frame))

    async def finish(self) -> bool:
        with calling("aggregator"):
            return bool((await self.call).newly_stored)

    async def error(self) -> None:
        with calling("aggregator"):
            await self.call


@dataclass
class Ann:
    """An operator, and what was told to her."""

    cluster: Cluster
    shard: Shard
    patience_s: float = 20.0
    tls: TlsFiles | None = None
    """Another certificate than that of the test network's."""
    arrived: list[int] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    async def ship(self, address: str = "") -> None:
        """As `cortex data add` does."""
        shard, tls = self.shard, self.tls or self.cluster.tls_of(Role.OPERATOR, ANN)
        to = address or self.cluster.address

        def patience(limit_s: float) -> Patience:
            return Patience(SystemClock(), min(limit_s, self.patience_s), lambda: None)

        sent = (to, tls, shard.folder, shard.told, self.arrived.append, self.cuts.append, patience)
        await asyncio.to_thread(ship_shards, *sent)

    @property
    def stub(self) -> aggregator_pb2_grpc.ShardServiceAsyncStub:
        return aggregator_pb2_grpc.ShardServiceStub(self.cluster.channel(Role.OPERATOR, ANN))

    async def offer(self, **changes: Any) -> aggregator_pb2.OfferShardResponse:
        """What the aggregator has, of a header with changes."""
        header = header_to_proto(replace(self.shard.header, **changes))
        with calling("aggregator"):
            return await self.stub.OfferShard(aggregator_pb2.OfferShardRequest(header=header))

    async def drop(self) -> int:
        request = aggregator_pb2.DropShardsRequest(sha256=[self.shard.header.model_sha256])
        with calling("aggregator"):
            return (await self.stub.DropShards(request)).dropped

    async def begin(self, stop: int) -> RawPut:
        """Send the first chunks, and leave the stream open."""
        put = RawPut(self.cluster)
        await put.send(self.shard.frames(0, stop))
        await self.until_offered(stop)
        return put

    async def begin_and_cut(self, stop: int) -> None:
        """Send the first chunks, and no more."""
        put = await self.begin(stop)
        put.call.cancel()

    async def until_offered(self, chunks: int) -> None:
        """Until the aggregator says that it holds so many chunks."""
        async with asyncio.timeout(20):
            while (await self.offer()).chunks != chunks:  # noqa: ASYNC110 - it has to be asked for
                await asyncio.sleep(0.01)

    async def until_held(self, chunks: int) -> None:
        wanted = sealed_bytes(self.shard.header, chunks)
        await eventually(lambda: self.incoming.exists() and self.incoming.stat().st_size >= wanted)

    @property
    def incoming(self) -> Path:
        """What has come of the shard."""
        return self.cluster.settings.state_dir / "incoming" / f"{self.shard.header.model_sha256}.sealed"

    @property
    def journal(self) -> Path:
        return self.incoming.with_suffix(".journal")

    @property
    def stored(self) -> Path:
        return self.cluster.settings.state_dir / "shards" / f"{self.shard.header.model_sha256}.shard"

    def is_there(self) -> bool:
        """Whether the shard is there as it was sealed, and nothing is left of its way."""
        left = [path.name for path in self.incoming.parent.iterdir()]
        return not left and self.stored.read_bytes() == self.shard.path.read_bytes()
