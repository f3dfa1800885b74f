"""Calls to other services: rounds at aggregators, model downloads, and who is in the network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cortex_common.errors import UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import JobId, SeatIndex, Sha256Hex
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc, common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.aggregator_channels import AggregatorChannels
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.following import follow
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.security.sealing import KeyWrapper, Wrap, check_public_key
from cortex_common.tensors import Arena
from cortex_common.transfer import PullResult, pull_model
from services.coordinator import wire
from services.coordinator.domain.job import Contribution
from services.coordinator.domain.seen import AggregatedVersion
from services.coordinator.orders import DataKeys, RoundOrder, SealOrder, Server

_CALL_S = 30.0
_SEAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What an aggregator has of a round: accepted updates, and for the others the share received, 0 to 1."""

    accepted: Mapping[SeatIndex, Contribution]
    received: Mapping[SeatIndex, float]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What the upper aggregator accepted of a tier, and the bytes of versions the tier fetched from there for it."""

    contribution: Contribution
    relayed_bytes: int


class AggregatorPort(Protocol):
    """What the coordinator asks of aggregators."""

    async def open_round(self, server: Server, order: RoundOrder) -> None:
        """Open a round, or refresh it."""

    def watch_round(self, server: Server, order: RoundOrder) -> AsyncIterator[Progress]:
        """The round's state now and at each change."""

    async def seal_round(self, server: Server, order: SealOrder) -> AggregatedVersion:
        """Fold the list into the next version."""

    async def forward_round(self, server: Server, order: SealOrder) -> Forwarded:
        """Push the list's mean one tier up."""

    async def clean(self, server: Server, job_id: JobId, fence: int, keep: Sequence[int], *, ended: bool) -> None:
        """Erase versions and spool of a job but these rounds' versions; once it has ended, what is open too."""

    async def reseal(self, server: Server, job_id: JobId, fence: int, keys: DataKeys) -> int:
        """Seal what is stored of a job under the current one of these keys; how many versions that took."""

    async def pull(self, server: Server, job_id: JobId, sha256: Sha256Hex, keys: Sequence[DataKey]) -> PullResult:
        """A whole version, opened and verified."""


class AggregatorClient:
    """Implements AggregatorPort over gRPC; keeps a control and a bulk channel to each aggregator that is not denied.

    Data keys go out wrapped to the sealing key of the aggregator that answers there.
    """

    def __init__(self, tls: TlsFiles, wrapper: KeyWrapper, denied: DenyList) -> None:
        self._wrapper = wrapper
        self._sealing_keys: dict[Server, bytes] = {}
        self._control = AggregatorChannels(tls, denied, bulk=False)
        self._bulk = AggregatorChannels(tls, denied)

    async def open_round(self, server: Server, order: RoundOrder) -> None:
        """Open a round, or refresh it."""
        async with self._wrapping(server) as wrap:
            await self._rounds(server).OpenRound(wire.open_request(order, wrap), timeout=_CALL_S)

    async def watch_round(self, server: Server, order: RoundOrder) -> AsyncIterator[Progress]:
        """The round's state now and at each change."""
        with calling(_told(server)):
            channel = self._control.to(server.address, server.name)
            async for answer in follow(channel, self._rounds(server).WatchRound, wire.watch_request(order)):
                yield Progress(wire.accepted_of(answer), wire.received_of(answer))

    async def seal_round(self, server: Server, order: SealOrder) -> AggregatedVersion:
        """Fold the list into the next version."""
        async with self._wrapping(server) as wrap:
            answer = await self._rounds(server).SealRound(wire.seal_request(order, wrap), timeout=_SEAL_S)
        return wire.aggregated_of(answer)

    async def forward_round(self, server: Server, order: SealOrder) -> Forwarded:
        """Push the list's mean one tier up."""
        async with self._wrapping(server) as wrap:
            answer = await self._rounds(server).ForwardRound(wire.forward_request(order, wrap), timeout=_SEAL_S)
        return Forwarded(wire.contribution_of(answer.receipt), answer.relayed_bytes)

    async def clean(self, server: Server, job_id: JobId, fence: int, keep: Sequence[int], *, ended: bool) -> None:
        """Erase versions and spool of a job but these rounds' versions; once it has ended, what is open too."""
        with calling(_told(server)):
            await self._rounds(server).PruneJob(wire.prune_request(job_id, fence, keep, ended=ended), timeout=_CALL_S)

    async def pull(self, server: Server, job_id: JobId, sha256: Sha256Hex, keys: Sequence[DataKey]) -> PullResult:
        """A whole version, opened and verified."""
        encryption = EncryptionManager(*keys)
        with calling(_told(server)):
            channel = self._bulk.to(server.address, server.name)
            return await pull_model(lambda: channel, job_id, sha256, "", encryption, Arena.zeros)

    async def reseal(self, server: Server, job_id: JobId, fence: int, keys: DataKeys) -> int:
        """Seal what is stored of a job under the current one of these keys; how many versions that took."""
        async with self._wrapping(server) as wrap:
            request = wire.reseal_request(job_id, fence, keys, wrap)
            return (await self._rounds(server).ResealJob(request, timeout=_SEAL_S)).resealed

    async def close(self) -> None:
        """Give up all connections."""
        await self._control.close()
        await self._bulk.close()

    @asynccontextmanager
    async def _wrapping(self, server: Server) -> AsyncIterator[Wrap]:
        """A call with data keys. One that fails because the aggregator was away asks for its sealing key anew."""
        try:
            with calling(_told(server)):
                if server not in self._sealing_keys:
                    request = aggregator_pb2.GetSealingKeyRequest()
                    answer = await self._rounds(server).GetSealingKey(request, timeout=_CALL_S)
                    check_public_key(answer.public_key)
                    self._sealing_keys[server] = answer.public_key
                yield partial(self._wrapper.wrap, self._sealing_keys[server])
        except UnavailableError:
            self._sealing_keys.pop(server, None)
            raise

    def _rounds(self, server: Server) -> aggregator_pb2_grpc.RoundServiceAsyncStub:
        return aggregator_pb2_grpc.RoundServiceStub(self._control.to(server.address, server.name))


class DiscoveryClient:
    """Who is in the network, as discovery says."""

    def __init__(self, address: str, tls: TlsFiles) -> None:
        self._address = address
        self._tls = tls

    async def watch(self) -> AsyncIterator[Sequence[common_pb2.Node]]:
        """All nodes now and at each change.

        Raises:
            UnavailableError: discovery cannot be reached, or went away.
        """
        channel = open_channel(self._address, self._tls, Role.DISCOVERY)
        try:
            stub: discovery_pb2_grpc.DiscoveryServiceAsyncStub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
            with calling(f"discovery at {self._address}"):
                async for answer in follow(channel, stub.WatchNodes, discovery_pb2.WatchNodesRequest()):
                    yield answer.nodes
        finally:
            await channel.close()


def _told(server: Server) -> str:
    return f"aggregator at {server.address}"
