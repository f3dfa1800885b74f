"""The network over gRPC and mutual TLS: what nodes with a certificate use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Role, TlsFiles
from cortex_common.network import messages as m
from cortex_common.network import wire
from cortex_common.network.heartbeat import Announcer, GrpcAnnouncer
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.aggregator_channels import AggregatorChannels
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.errors import calling
from cortex_common.rpc.following import follow

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Peers:
    """Who to call: host:port each."""

    coordinator: str
    discovery: str


class GrpcTransport:
    """Lines, reports, heartbeats and weights as RPCs, each kind on a connection of its own."""

    def __init__(
        self,
        hello: m.Hello,
        peers: Peers,
        tls: TlsFiles,
        clock: Clock,
        sealing_key: bytes,
        metadata: Callable[[], Metadata] = tuple,
        denied: DenyList | None = None,
    ) -> None:
        """Prepare; nothing is dialled yet.

        Args:
            hello: Who attends.
            peers: Whom to call.
            tls: This process's certificate.
            clock: Tells whether the certificate is still good.
            sealing_key: The node's public key, to which its data keys are wrapped.
            metadata: Goes along with each call: a gateway's proof of whom it speaks for.
            denied: Who is shut out: no aggregator that is gets anything.
        """
        self.what = f"coordinator at {peers.coordinator}"
        self._hello = hello
        self._peers = peers
        self._tls = tls
        self._clock = clock
        self._sealing_key = sealing_key
        self._metadata = metadata
        self._reports: grpc.aio.Channel | None = None
        self._aggregators = AggregatorChannels(tls, denied or DenyList(), clock=clock)

    async def listen(self, deliver: Callable[[m.ToNode], None]) -> None:
        """One line, until it breaks. On a channel of its own: its retries are ours, not gRPC's."""
        async with open_channel(self._peers.coordinator, self._tls, Role.COORDINATOR, clock=self._clock) as channel:
            stub: coordinator_pb2_grpc.AssignmentServiceAsyncStub = coordinator_pb2_grpc.AssignmentServiceStub(channel)
            with calling(self.what):
                request, is_first = wire.attend_request(self._hello, self._sealing_key), True
                metadata = tuple(self._metadata())
                async for response in follow(channel, stub.Attend, request, metadata=metadata):
                    deliver(wire.assignments_from_proto(response, is_first=is_first))
                    is_first = False

    async def ask(self, message: m.FromNode, *, timeout_s: float, waits: bool) -> m.ToNode:
        """Reports; what else a node may ask has RPCs of its own."""
        if not isinstance(message, m.TrainingMetrics | m.WorkResult):
            raise InvalidArgumentError(f"{type(message).__name__} given; allowed over gRPC: reports")
        if self._reports is None:
            self._reports = open_channel(self._peers.coordinator, self._tls, Role.COORDINATOR, clock=self._clock)
        stub: coordinator_pb2_grpc.AssignmentServiceAsyncStub = coordinator_pb2_grpc.AssignmentServiceStub(
            self._reports
        )
        request = wire.report_request(message, self._hello)
        with calling(self.what):
            answer = await stub.Report(
                request, timeout=timeout_s, wait_for_ready=waits, metadata=tuple(self._metadata())
            )
        return m.ReportAck(answer.wanted)

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """The data-plane channel to an aggregator."""
        return self._aggregators.to(address, aggregator)

    def announcer(self) -> Announcer:
        """Heartbeats go to discovery."""
        return GrpcAnnouncer(
            lambda: open_channel(self._peers.discovery, self._tls, Role.DISCOVERY, clock=self._clock),
            f"discovery at {self._peers.discovery}",
            self._metadata,
        )

    async def close(self) -> None:
        """Hang up."""
        reports, self._reports = self._reports, None
        if reports is not None:
            await reports.close()
        await self._aggregators.close()
