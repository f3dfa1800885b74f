"""Calls that the gateway makes for a node: each carries the pass that says so. The only file that knows both sides."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import InvalidArgumentError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network import messages as m
from cortex_common.network import wire
from cortex_common.network.heartbeat import NodeReport, node_to_proto
from cortex_common.pb.v1 import (
    aggregator_pb2,
    coordinator_pb2,
    coordinator_pb2_grpc,
    discovery_pb2,
    discovery_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
)
from cortex_common.rpc.aggregator_channels import AggregatorChannels
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.errors import calling, unless_cut
from cortex_common.rpc.following import follow
from cortex_common.rpc.passing import PASS_KEY
from cortex_common.transfer import PULL_METHOD, PUSH_METHOD
from cortex_common.transfer.retrying import transferring
from cortex_common.transfer.wire import receipt_from_proto

_CALL_S = 15.0
_BEAT_S = 5.0
LINES = 16
"""Connections to each aggregator, to which nodes are dealt: one bears 128 transfers at a time, and whoever fills it
holds up only those that are dealt to the same one.
"""
_Metadata = tuple[tuple[str, bytes], ...]


class NodePeers:
    """The services behind the gateway, as nodes need them."""

    def __init__(self, coordinator: str, discovery: str, tls: TlsFiles, clock: Clock, denied: DenyList) -> None:
        self._coordinator = coordinator
        self._discovery = discovery
        self._tls = tls
        self._clock = clock
        self._opened = AsyncExitStack()
        self._lines = tuple(AggregatorChannels(tls, denied, clock=clock) for _ in range(LINES))
        self._reports: Any = None
        self._nodes: Any = None

    async def __aenter__(self) -> NodePeers:
        reports = await self._opened.enter_async_context(self._dial(self._coordinator, Role.COORDINATOR))
        self._nodes = await self._opened.enter_async_context(self._dial(self._discovery, Role.DISCOVERY))
        self._reports = coordinator_pb2_grpc.AssignmentServiceStub(reports)
        return self

    async def __aexit__(self, *error: object) -> None:
        for line in self._lines:
            await line.close()
        await self._opened.aclose()

    async def challenge(self) -> bytes:
        """What a node is to sign.

        Raises:
            UnavailableError: discovery is away, or refuses the gateway itself: that is no fault of the node's token.
        """
        stub = identity_pb2_grpc.IdentityServiceStub(self._nodes)
        what = f"discovery at {self._discovery}"
        try:
            with calling(what):
                answer = await stub.ChallengeNode(identity_pb2.ChallengeNodeRequest(), timeout=_CALL_S)
        except UnauthenticatedError as error:
            raise UnavailableError(f"{what} refuses this gateway: {error.message}") from error
        return bytes(answer.challenge)

    async def admit(self, join: m.Join) -> tuple[NodeRelay, float]:
        """What speaks for the node from now on, and for how many seconds.

        Raises:
            UnauthenticatedError, ForbiddenError: the network does not let it in.
        """
        request = identity_pb2.AdmitNodeRequest(
            node=join.hello.node,
            region=join.hello.region,
            token_id=join.token_id,
            sealing_key=join.sealing_key,
            challenge=bytes.fromhex(join.challenge),
            proof=join.proof,
        )
        stub = identity_pb2_grpc.IdentityServiceStub(self._nodes)
        with calling(f"discovery at {self._discovery}"):
            answer = await stub.AdmitNode(request, timeout=_CALL_S)
        return NodeRelay(self, join, ((PASS_KEY, getattr(answer, "pass")),)), answer.life_s

    async def attend(self, join: m.Join, metadata: _Metadata) -> AsyncGenerator[m.Assignments]:
        """A node's line to the coordinator, on a connection of its own as every node has one."""
        request, is_first = wire.attend_request(join.hello, bytes.fromhex(join.sealing_key)), True
        async with self._dial(self._coordinator, Role.COORDINATOR) as channel:
            stub: Any = coordinator_pb2_grpc.AssignmentServiceStub(channel)
            with calling(f"coordinator at {self._coordinator}"):
                async for response in follow(channel, stub.Attend, request, metadata=metadata):
                    yield wire.assignments_from_proto(response, is_first=is_first)
                    is_first = False

    async def report(self, request: coordinator_pb2.ReportRequest, metadata: _Metadata) -> bool:
        """Whether what is reported on is still wanted."""
        with calling(f"coordinator at {self._coordinator}"):
            answer = await self._reports.Report(request, timeout=_CALL_S, metadata=metadata)
        return bool(answer.wanted)

    async def beat(self, node: NodeReport, metadata: _Metadata) -> float:
        """Seconds until the next heartbeat is due."""
        stub = discovery_pb2_grpc.DiscoveryServiceStub(self._nodes)
        with _written():
            request = discovery_pb2.HeartbeatRequest(node=node_to_proto(node))
        with calling(f"discovery at {self._discovery}"):
            answer = await stub.Heartbeat(request, timeout=_BEAT_S, metadata=metadata)
        return float(answer.heartbeat_s)

    async def leave(self, hello: m.Hello, metadata: _Metadata) -> None:
        """End a node's lease."""
        stub = discovery_pb2_grpc.DiscoveryServiceStub(self._nodes)
        with calling(f"discovery at {self._discovery}"):
            request = discovery_pb2.LeaveRequest(name=hello.node, incarnation=hello.incarnation)
            await stub.Leave(request, timeout=_BEAT_S, metadata=metadata)

    def to(self, address: str, aggregator: str, node: str) -> grpc.aio.Channel:
        """The data plane of an aggregator, for a node."""
        return self._lines[line_of(node)].to(address, aggregator)

    def _dial(self, address: str, role: Role) -> grpc.aio.Channel:
        return open_channel(address, self._tls, role, clock=self._clock)


class NodeRelay:
    """One node as the network sees it, through this gateway. Weights pass through sealed, as bytes."""

    def __init__(self, peers: NodePeers, join: m.Join, metadata: _Metadata) -> None:
        self.hello = join.hello
        self._join = join
        self._peers = peers
        self._metadata = metadata

    def attend(self) -> AsyncGenerator[m.Assignments]:
        """Everything wanted of the node, now and at each change."""
        return self._peers.attend(self._join, self._metadata)

    async def report(self, report: m.TrainingMetrics | m.WorkResult) -> bool:
        """Pass a report on; False when its assignment is no longer wanted."""
        with _written():
            request = wire.report_request(report, self.hello)
        return await self._peers.report(request, self._metadata)

    async def beat(self, beat: m.Heartbeat) -> float:
        """Renew the node's lease; seconds until the next heartbeat is due."""
        node = NodeReport(
            name=NodeName(self.hello.node),
            role=Role.WORKER,
            region=self.hello.region,
            address="",
            incarnation=self.hello.incarnation,
            version=beat.version,
            resources=beat.resources,
            started_s=beat.started_s,
            activity=beat.activity,
            datasets=beat.datasets,
        )
        return await self._peers.beat(node, self._metadata)

    async def leave(self) -> None:
        """End the node's lease."""
        await self._peers.leave(self.hello, self._metadata)

    def push(self, address: str, aggregator: str) -> Push:
        """Begin an upload to an aggregator.

        Raises:
            UnavailableError: it is shut out.
        """
        return Push(self._peers.to(address, aggregator, self.hello.node), self._metadata)

    async def pull(self, address: str, aggregator: str, pull: m.ModelPull) -> AsyncGenerator[bytes]:
        """The frames of a version, header to trailer, as they come."""
        request = wire.pull_request(pull)
        method: Any = self._peers.to(address, aggregator, self.hello.node).unary_stream(
            PULL_METHOD, request_serializer=aggregator_pb2.PullModelRequest.SerializeToString
        )
        call = method(request, metadata=self._metadata)
        try:
            with transferring(f"downloading a model of job {pull.job_id}"):
                while isinstance(data := await call.read(), bytes):
                    yield data
        finally:
            call.cancel()


class Push:
    """An upload being passed on."""

    def __init__(self, channel: grpc.aio.Channel, metadata: _Metadata) -> None:
        method: Any = channel.stream_stream(
            PUSH_METHOD, response_deserializer=aggregator_pb2.PushUpdateResponse.FromString
        )
        self._call = method(metadata=metadata)

    async def send(self, frame: bytes) -> bool:
        """Pass a frame on; True when there is room for the next, False when the aggregator has ended the call."""
        try:
            with unless_cut("passing an update on"):
                await self._call.write(frame)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError, UnavailableError):
            return False
        return True

    async def finish(self) -> None:
        """That was the last frame."""
        await self._call.done_writing()

    async def answer(self) -> m.WeightsResume | m.WeightsAccepted:
        """The aggregator's next answer.

        Raises:
            CortexError: it refuses the update, or is away.
        """
        with transferring("passing an update on"):
            answer = await self._call.read()
        if not isinstance(answer, aggregator_pb2.PushUpdateResponse):
            raise UnavailableError("the aggregator ended an upload before its receipt")
        if answer.HasField("receipt"):
            return m.WeightsAccepted(receipt_from_proto(answer.receipt))
        return m.WeightsResume(answer.resume.first_chunk, answer.resume.already_accepted)

    def cancel(self) -> None:
        """Break it off; without effect on one that is through."""
        self._call.cancel()


def line_of(node: str) -> int:
    """Which of the connections to an aggregator a node's transfers go over; always the same."""
    return zlib.crc32(node.encode()) % LINES


@contextmanager
def _written() -> Iterator[None]:
    """Where a node's message becomes protobuf, which does not take all that JSON does.

    Raises:
        InvalidArgumentError: a number is too large, or text cannot be encoded.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(f"the message cannot be passed on: {error}") from None
