"""A running aggregator over real mutual TLS, and what a coordinator and workers do with it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import numpy as np

from cortex_common.clock import SystemClock
from cortex_common.codec import WeightCompressor
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.storage.records import read_record
from cortex_common.tensors import Arena, ChunkRange, Manifest, TensorKind, chunk_count
from cortex_common.transfer import PullResult, PushResult, Receipt, pull_model, push_update
from services.aggregator.main import run
from services.aggregator.settings import AggregatorSettings
from tests.keys import wrapped

if TYPE_CHECKING:
    from tests.integration.aggregator.ways import ThroughGateway

JOB = JobId("job-1")
CHUNK = 1024
MANIFEST = Manifest.of(
    [
        ("net.weight", (50, 60), TensorKind.TRAINABLE),
        ("net.bias", (61,), TensorKind.TRAINABLE),
        ("norm.mean", (10,), TensorKind.BUFFER),
        ("norm.batches", (), TensorKind.COUNTER),
    ]
)
Issue = Callable[..., TlsFiles]


def arena_of(seed: int, manifest: Manifest = MANIFEST, scale: float = 1.0) -> Arena:
    """Random numbers for a layout."""
    rng = np.random.default_rng(seed)
    values = (scale * rng.standard_normal(manifest.elements)).astype(np.float32)
    return Arena(values, rng.integers(0, 100, manifest.counters))


@dataclass
class Cluster:
    """Clients of one aggregator; `restart` brings up a new service over the same state.

    Attributes:
        way: Of the workers to it; by default gRPC, with certificates of their own.
    """

    tls_of: Issue
    settings: AggregatorSettings
    way: ThroughGateway | None = None
    key: DataKey = field(default_factory=EncryptionManager.new_data_key)
    fence: int = 1
    chunk_elements: int = CHUNK
    codec: str = "none"
    strategy: str = "fedavg"
    strategy_options: str = "{}"
    download: str = "none"
    readers: tuple[str, ...] = tuple(f"w{number}" for number in range(10))
    """Who has a seat of the job, whether it takes part in a round or not."""
    address: str = ""
    sealing_key: bytes = b""
    _channels: list[grpc.aio.Channel] = field(default_factory=list)
    _stop: asyncio.Event | None = None
    _task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._stop = asyncio.Event()
        started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(run(self.settings, SystemClock(), self._stop, started))
        done, _ = await asyncio.wait((started, self._task), return_when=asyncio.FIRST_COMPLETED)
        if self._task in done:
            self._task.result()
        self.running = started.result()
        self.address = self.running.address
        self.settings = self.settings.model_copy(update={"port": started.result().port})
        await self.meet()
        if self.way is not None:
            await self.way.lead_to(self.address)

    async def meet(self) -> None:
        """Ask the aggregator what to wrap keys to."""
        self.sealing_key = (await self.rounds.GetSealingKey(aggregator_pb2.GetSealingKeyRequest())).public_key

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()
        assert self._stop is not None
        assert self._task is not None
        self._stop.set()
        await self._task

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def channel(self, role: Role, name: str = "") -> grpc.aio.Channel:
        if role is Role.WORKER and self.way is not None:
            channel = self.way.channel(name)
        else:
            channel = open_channel(self.address, self.tls_of(role, name), Role.AGGREGATOR, bulk=True)
        self._channels.append(channel)
        return channel

    @property
    def rounds(self) -> aggregator_pb2_grpc.RoundServiceAsyncStub:
        return aggregator_pb2_grpc.RoundServiceStub(self.channel(Role.COORDINATOR))

    @property
    def encryption(self) -> EncryptionManager:
        return EncryptionManager(self.key)

    def spec(self, number: int, base: str = "", seats: int = 1, attempt: int = 0) -> aggregator_pb2.RoundSpec:
        return aggregator_pb2.RoundSpec(
            job_id=JOB,
            round=number,
            attempt=attempt,
            fence=self.fence,
            base_sha256=base,
            seats=[aggregator_pb2.Seat(seat=seat, worker=f"w{seat}") for seat in range(seats)],
            codec=self.codec if number else "none",
            strategy=self.strategy,
            strategy_options=self.strategy_options,
            chunk_elements=self.chunk_elements,
            data_key=wrapped(self.sealing_key, JOB, self.key),
            download_codec=self.download if number else "none",
            readers=self.readers,
        )

    async def open(self, number: int, base: str = "", seats: int = 1, attempt: int = 0) -> None:
        await self.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=self.spec(number, base, seats, attempt)))

    def header(
        self,
        number: int,
        base: str = "",
        seat: int = 0,
        weight: float = 1.0,
        manifest: Manifest = MANIFEST,
        attempt: int = 0,
    ) -> ObjectHeader:
        codec = WeightCompressor.create(self.codec if number else "none")
        return ObjectHeader(
            kind=ObjectKind.UPDATE,
            network="cortex",
            job_id=JOB,
            round=RoundNumber(number),
            attempt=attempt,
            fence=self.fence,
            sender=NodeName(f"w{seat}"),
            seat=SeatIndex(seat),
            key_id=self.key.key_id,
            codec=codec.codec,
            codec_options=codec.options_json,
            chunk_elements=self.chunk_elements,
            elements=manifest.elements,
            counters=manifest.counters,
            chunks=chunk_count(manifest.elements, manifest.counters, self.chunk_elements),
            manifest_sha256=manifest.sha256,
            base_sha256=base,
            manifest=manifest.to_json() if number == 0 else b"",
            weight=weight,
        ).fresh()

    async def push(self, header: ObjectHeader, arena: Arena, channel: grpc.aio.Channel | None = None) -> PushResult:
        encode = encoder(header, arena)
        channel = channel or self.channel(Role.WORKER, header.sender)
        return await push_update(lambda: channel, header, encode, self.encryption)

    async def seal(self, number: int, receipts: list[Receipt], attempt: int = 0) -> aggregator_pb2.SealRoundResponse:
        request = aggregator_pb2.SealRoundRequest(
            job_id=JOB,
            round=number,
            attempt=attempt,
            fence=self.fence,
            contributions=[
                aggregator_pb2.Contribution(
                    seat=each.seat, worker=each.worker, content_sha256=each.content_sha256, weight=each.weight
                )
                for each in receipts
            ],
            data_key=wrapped(self.sealing_key, JOB, self.key),
        )
        return await self.rounds.SealRound(request)

    async def pull(self, sha256: str, held: str = "", number: int = 1, worker: str = "w0") -> PullResult:
        channel = self.channel(Role.WORKER, worker)
        return await pull_model(lambda: channel, JOB, sha256, held, self.encryption, Arena.zeros, RoundNumber(number))

    async def next_version(self, number: int, base: str, update: Arena) -> str:
        """A round of one update to its end; the version's digest."""
        await self.open(number, base)
        pushed = await self.push(self.header(number, base), update)
        return (await self.seal(number, [pushed.receipt])).version.sha256

    async def first_version(self, arena: Arena, manifest: Manifest = MANIFEST) -> str:
        """Round 0 to its end; the version's digest."""
        await self.open(0)
        pushed = await self.push(self.header(0, manifest=manifest), arena)
        return (await self.seal(0, [pushed.receipt])).version.sha256

    async def view(self, number: int, attempt: int = 0) -> aggregator_pb2.WatchRoundResponse:
        request = aggregator_pb2.WatchRoundRequest(job_id=JOB, round=number, attempt=attempt)
        call = self.rounds.WatchRound(request)
        view = await call.read()
        call.cancel()
        assert isinstance(view, aggregator_pb2.WatchRoundResponse)
        return view

    def spool(self, number: int, attempt: int = 0) -> Path:
        return self.settings.state_dir / "spool" / JOB / f"{number}-{attempt}"


def object_begun(update: Path) -> str:
    """Which object the update in a spool is of."""
    file = os.open(update, os.O_RDONLY)
    try:
        first = read_record(file)
    finally:
        os.close(file)
    assert first is not None
    return str(json.loads(first[0])["object_id"])


def encoder(header: ObjectHeader, arena: Arena) -> Callable[[ChunkRange], bytes | bytearray]:
    """Plaintext of the chunks of an arena."""
    codec = WeightCompressor.from_wire(header.codec, header.codec_options)

    def encode(part: ChunkRange) -> bytes | bytearray:
        if part.is_counters:
            return codec.encode_counters(arena.counters)
        return codec.encode(arena.values[part.start : part.stop])

    return encode


def settings_for(tls: TlsFiles, state_dir: Path, **changes: object) -> AggregatorSettings:
    settings = AggregatorSettings(
        ca=tls.ca,
        certificate=tls.certificate,
        key=tls.key,
        name="aggregator-1",
        state_dir=state_dir,
        disk_reserve_bytes=0,
        progress_every_s=0.01,
    )
    return settings.model_copy(update=changes)


@asynccontextmanager
async def running_cluster(
    tls_of: Issue, state_dir: Path, way: ThroughGateway | None = None, **changes: object
) -> AsyncIterator[Cluster]:
    cluster = Cluster(tls_of, settings_for(tls_of(Role.AGGREGATOR, "aggregator-1"), state_dir, **changes), way=way)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.stop()


__all__ = ["CHUNK", "JOB", "MANIFEST", "Cluster", "arena_of", "encoder", "replace", "running_cluster"]
