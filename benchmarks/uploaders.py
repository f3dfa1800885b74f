"""Simulated workers: as many as one likes, in one process, against a real aggregator.

Each has its own certificate, connection and upload; what they send is encoded, sealed and sent as by a real worker.
They share the memory of the model, so that 64 of them fit where 64 real workers would not. A stand-in for the
coordinator opens and seals the rounds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
import numpy as np

from benchmarks.certificates import NETWORK, Certificates
from benchmarks.workloads import Kind, Workload
from cortex_common.clock import SystemClock
from cortex_common.codec import WeightCompressor
from cortex_common.identity import Role
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc, common_pb2
from cortex_common.rpc.channel import open_channel
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.security.sealing import KeyWrapper
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS, Arena, ChunkRange, Manifest, TensorKind, chunk_count
from cortex_common.transfer import Receipt, pull_model, push_update
from cortex_common.transfer.wire import data_key_to_proto

_JOB = JobId("bench")
_FENCE = 1
_RPC_S = 600.0


@dataclass(frozen=True, slots=True)
class RoundCost:
    """One round of simulated workers, in wall seconds and sealed bytes of all workers."""

    workers: int
    seconds: float
    pull_s: float
    push_s: float
    fold_s: float
    bytes_up: int
    bytes_down: int


class RoundKeeper:
    """What a coordinator asks of an aggregator, and nothing more."""

    def __init__(self, channel: grpc.aio.Channel, key: DataKey, workers: int) -> None:
        self._rounds: aggregator_pb2_grpc.RoundServiceAsyncStub = aggregator_pb2_grpc.RoundServiceStub(channel)
        self._key = key
        self._wrapper = KeyWrapper(NETWORK)
        self._sealing_key = b""
        self._workers = workers

    async def open(self, number: int, base: str, codec: WeightCompressor) -> None:
        """Open a round for everybody; round 0 for the first worker."""
        seats = range(self._workers if number else 1)
        spec = aggregator_pb2.RoundSpec(
            job_id=_JOB,
            round=number,
            fence=_FENCE,
            base_sha256=base,
            seats=[aggregator_pb2.Seat(seat=seat, worker=name_of(seat)) for seat in seats],
            codec=codec.codec,
            codec_options=codec.options_json,
            strategy="fedavg",
            strategy_options="{}",
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            data_key=await self._wrapped_key(),
        )
        await self._rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec), timeout=_RPC_S)

    async def seal(self, number: int, receipts: Sequence[Receipt]) -> str:
        """Have the updates folded, forget all older versions; the new version's digest."""
        contributions = [
            aggregator_pb2.Contribution(
                seat=each.seat, worker=each.worker, content_sha256=each.content_sha256, weight=each.weight
            )
            for each in receipts
        ]
        request = aggregator_pb2.SealRoundRequest(
            job_id=_JOB,
            round=number,
            fence=_FENCE,
            contributions=contributions,
            data_key=await self._wrapped_key(),
        )
        sha256 = (await self._rounds.SealRound(request, timeout=_RPC_S)).version.sha256
        prune = aggregator_pb2.PruneJobRequest(job_id=_JOB, fence=_FENCE, keep_rounds=[number])
        await self._rounds.PruneJob(prune, timeout=_RPC_S)
        return str(sha256)

    async def _wrapped_key(self) -> common_pb2.DataKey:
        if not self._sealing_key:
            answer = await self._rounds.GetSealingKey(aggregator_pb2.GetSealingKeyRequest(), timeout=_RPC_S)
            self._sealing_key = answer.public_key
        return data_key_to_proto(self._wrapper.wrap(self._sealing_key, _JOB, self._key))


class Uploaders:
    """Simulated workers and what they share."""

    def __init__(self, workload: Workload, keeper: RoundKeeper, channels: Sequence[grpc.aio.Channel], key: DataKey):
        self._workload = workload
        self._keeper = keeper
        self._channels = channels
        self._key = key
        self._codec = WeightCompressor.create(workload.codec, {}, "off")
        self._manifest = Manifest.of([("weights", (workload.parameters,), TensorKind.TRAINABLE)])
        # All pull into one arena: they write the same numbers.
        self._arena = Arena.zeros(self._manifest)
        self._delta_D = _noise(workload.parameters)
        self._clock = SystemClock()
        self._version = ""

    async def begin(self) -> None:
        """Round 0: the first version."""
        exact = WeightCompressor.create("none", {}, "off")
        await self._keeper.open(0, "", exact)
        pushed = await self._push(0, 0, exact)
        self._version = await self._keeper.seal(0, [pushed])

    async def round(self, number: int) -> RoundCost:
        """Everybody pulls, everybody pushes, the aggregator folds."""
        base = self._version
        begun_s = self._clock.monotonic_s()
        await self._keeper.open(number, base, self._codec)
        pulls = self._workload.kind is Kind.EXCHANGE
        down = await asyncio.gather(*(self._pull(seat, number) for seat in self._seats)) if pulls else []
        pulled_s = self._clock.monotonic_s()
        receipts = await asyncio.gather(*(self._push(seat, number, self._codec) for seat in self._seats))
        pushed_s = self._clock.monotonic_s()
        self._version = await self._keeper.seal(number, receipts)
        ended_s = self._clock.monotonic_s()
        return RoundCost(
            workers=self._workload.workers,
            seconds=ended_s - begun_s,
            pull_s=pulled_s - begun_s,
            push_s=pushed_s - pulled_s,
            fold_s=ended_s - pushed_s,
            bytes_up=sum(receipt.size_bytes for receipt in receipts),
            bytes_down=sum(down),
        )

    @property
    def _seats(self) -> range:
        return range(self._workload.workers)

    async def _pull(self, seat: int, number: int) -> int:
        result = await pull_model(
            lambda: self._channels[seat],
            _JOB,
            Sha256Hex(self._version),
            "",
            EncryptionManager(self._key),
            lambda _: self._arena,
            RoundNumber(number),
        )
        return result.bytes_down

    async def _push(self, seat: int, number: int, codec: WeightCompressor) -> Receipt:
        def encode(part: ChunkRange) -> bytes | bytearray:
            return codec.encode(self._delta_D[part.start : part.stop])

        header = self._header(seat, number, codec)
        pushed = await push_update(self._channels[seat], header, encode, EncryptionManager(self._key))
        return pushed.receipt

    def _header(self, seat: int, number: int, codec: WeightCompressor) -> ObjectHeader:
        manifest = self._manifest
        return ObjectHeader(
            kind=ObjectKind.UPDATE,
            network=NETWORK,
            job_id=_JOB,
            round=RoundNumber(number),
            attempt=0,
            fence=_FENCE,
            sender=NodeName(name_of(seat)),
            seat=SeatIndex(seat),
            key_id=self._key.key_id,
            codec=codec.codec,
            codec_options=codec.options_json,
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            elements=manifest.elements,
            counters=manifest.counters,
            chunks=chunk_count(manifest.elements, manifest.counters, DEFAULT_CHUNK_ELEMENTS),
            manifest_sha256=manifest.sha256,
            base_sha256=self._version,
            manifest=b"" if number else manifest.to_json(),
            weight=1.0,
        ).fresh()


def name_of(seat: int) -> str:
    """Name of the worker in a seat."""
    return f"worker-{seat}"


@asynccontextmanager
async def uploaders(
    workload: Workload, address: str, certificates: Certificates, addresses: Sequence[str] = ()
) -> AsyncIterator[Uploaders]:
    """Connect as a coordinator and as so many workers.

    Args:
        workload: What they will do.
        address: Of the aggregator.
        certificates: Of everybody.
        addresses: Under which each worker reaches the aggregator, where that differs.
    """
    key = EncryptionManager.new_data_key()
    control = open_channel(address, certificates.of(Role.COORDINATOR, "coordinator"), Role.AGGREGATOR)
    bulk = [
        open_channel(place, certificates.of(Role.WORKER, name_of(seat)), Role.AGGREGATOR, bulk=True)
        for seat, place in enumerate(addresses or [address] * workload.workers)
    ]
    try:
        yield Uploaders(workload, RoundKeeper(control, key, workload.workers), bulk, key)
    finally:
        for channel in (*bulk, control):
            await channel.close()


def _noise(elements: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Small numbers no codec shrinks by luck."""
    return np.random.default_rng(0).standard_normal(elements, np.float32) * np.float32(1e-3)
