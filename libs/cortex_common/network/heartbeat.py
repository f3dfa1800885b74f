"""How a node announces itself to discovery, and goes on doing so whatever happens there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from cortex_common.lifecycle import sleep_unless
from cortex_common.logging import get_logger
from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.errors import calling
from cortex_common.telemetry.resources import Resources
from cortex_common.telemetry.wire import resources_to_proto

_log = get_logger(__name__)

ChannelFactory = Callable[[], grpc.aio.Channel]
_CALL_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 1.0
_FIRST_RETRY_S = 0.5
_JITTER = 0.1
# Bounds for what a discovery may ask for.
_SHORTEST_S = 0.05
_LONGEST_S = 60.0


class Dataset(Protocol):
    """What others may know of a dataset."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def input_shape(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def classes(self) -> int: ...  # noqa: D102
    @property
    def examples(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node as it describes itself.

    Attributes:
        address: host:port of its gRPC server; empty for a node that only dials out.
        incarnation: Differs at every start of the process.
        started_s: Wall time in seconds.
    """

    name: NodeName
    role: Role
    region: str
    address: str
    incarnation: str
    version: str
    resources: Resources
    started_s: float
    activity: str = ""
    datasets: tuple[Dataset, ...] = ()


def node_to_proto(report: NodeReport) -> common_pb2.Node:
    """For a heartbeat."""
    node = common_pb2.Node(
        name=report.name,
        role=common_pb2.Role.Value(f"ROLE_{report.role.name}"),
        region=report.region,
        address=report.address,
        incarnation=report.incarnation,
        version=report.version,
        resources=resources_to_proto(report.resources),
        activity=report.activity,
        datasets=[
            common_pb2.DatasetInfo(
                name=each.name, input_shape=each.input_shape, classes=each.classes, examples=each.examples
            )
            for each in report.datasets
        ],
    )
    node.started_at.FromMicroseconds(round(report.started_s * 1e6))
    return node


class Announcer(Protocol):
    """Takes a node's heartbeats; `what` names the peer for people."""

    what: str

    async def beat(self, node: NodeReport) -> float:
        """Send one heartbeat; seconds until the next is due.

        Raises:
            CortexError: it was not taken.
        """

    async def leave(self, node: NodeReport) -> None:
        """Say goodbye.

        Raises:
            CortexError: nobody listened.
        """

    async def close(self) -> None:
        """Give the connection up; the next heartbeat opens another."""


async def heartbeat_forever(
    channel_factory: ChannelFactory,
    node: Callable[[], NodeReport],
    clock: Clock,
    stop: asyncio.Event,
    *,
    what: str = "discovery",
    seed: int | None = None,
) -> None:
    """Announce this node to discovery until `stop` is set, then leave.

    Args:
        channel_factory: Opens a channel to discovery; asked again after a failure, so that a renewed certificate
            is used.
        node: The node as it is now.
        clock: Does the waiting.
        stop: Ends it.
        what: Who is called, for logs: "discovery at 127.0.0.1:50052".
        seed: Of the jitter (±10 %) that keeps nodes from beating in step.
    """
    await announce_forever(GrpcAnnouncer(channel_factory, what), node, clock, stop, seed=seed)


async def announce_forever(
    announcer: Announcer,
    node: Callable[[], NodeReport],
    clock: Clock,
    stop: asyncio.Event,
    *,
    seed: int | None = None,
) -> None:
    """Announce a node until `stop` is set, then leave.

    Discovery says how often. While it is away, attempts go on: after 0.5 s, then ever more seldom
    up to its last interval.

    Args:
        announcer: Takes the heartbeats.
        node: The node as it is now.
        clock: Does the waiting.
        stop: Ends it.
        seed: Of the jitter (±10 %) that keeps nodes from beating in step.
    """
    line = _Line(announcer, node)
    jitter = random.Random(seed)  # noqa: S311 - spreads load, guards nothing
    try:
        while not stop.is_set():
            wait_s = await line.beat()
            if await sleep_unless(stop, wait_s * jitter.uniform(1 - _JITTER, 1 + _JITTER), clock):
                break
        await line.leave()
    finally:
        await announcer.close()


class _Line:
    """What is known of the way to discovery."""

    def __init__(self, announcer: Announcer, node: Callable[[], NodeReport]) -> None:
        self._announcer = announcer
        self._node = node
        self._interval_s = 3.0
        self._failures = 0
        self._reason = ""

    async def beat(self) -> float:
        """Send one heartbeat; seconds until the next."""
        try:
            due_s = await self._announcer.beat(self._node())
        except (CortexError, OSError) as error:
            # The latter: the machine could not be looked at, as when no descriptor is left. No service ends for that.
            return await self._failed(error)
        if self._failures or not self._reason:
            _log.info("discovery_reached", discovery=self._announcer.what, after_failures=self._failures)
        self._failures, self._reason = 0, "reached"
        self._interval_s = min(max(due_s, _SHORTEST_S), _LONGEST_S)
        return self._interval_s

    async def leave(self) -> None:
        """Say goodbye, if anybody listens."""
        if self._failures or not self._reason:
            return
        try:
            await self._announcer.leave(self._node())
        except (CortexError, OSError) as error:
            _log.info("discovery_not_told", discovery=self._announcer.what, reason=str(error))

    async def _failed(self, error: CortexError | OSError) -> float:
        await self._announcer.close()
        self._failures += 1
        if str(error) != self._reason:
            self._reason = str(error)
            _log.warning("discovery_away", discovery=self._announcer.what, reason=self._reason)
        return min(_FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 16), self._interval_s)


class GrpcAnnouncer:
    """Heartbeats as RPCs of discovery; `metadata` goes along with each."""

    def __init__(
        self,
        channel_factory: ChannelFactory,
        what: str,
        metadata: Callable[[], Sequence[tuple[str, str | bytes]]] = tuple,
    ) -> None:
        self.what = what
        self._factory = channel_factory
        self._metadata = metadata
        self._channel: grpc.aio.Channel | None = None

    async def beat(self, node: NodeReport) -> float:
        """Renew the node's lease."""
        request = discovery_pb2.HeartbeatRequest(node=node_to_proto(node))
        with calling(self.what):
            answer = await self._stub().Heartbeat(request, timeout=_CALL_TIMEOUT_S, metadata=tuple(self._metadata()))
        return answer.heartbeat_s

    async def leave(self, node: NodeReport) -> None:
        """End the node's lease."""
        request = discovery_pb2.LeaveRequest(name=node.name, incarnation=node.incarnation)
        with calling(self.what):
            await self._stub().Leave(request, timeout=_LEAVE_TIMEOUT_S, metadata=tuple(self._metadata()))

    async def close(self) -> None:
        """Give the connection up."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    def _stub(self) -> discovery_pb2_grpc.DiscoveryServiceAsyncStub:
        if self._channel is None:
            self._channel = self._factory()
        return discovery_pb2_grpc.DiscoveryServiceStub(self._channel)
