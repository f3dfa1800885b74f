"""A server over real mutual TLS, in process."""

# ruff: noqa: N802
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import pytest

from cortex_common.errors import InvalidArgumentError, UnavailableError, Violation
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc, common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.identity import current_identity
from cortex_common.rpc.server import RpcSettings, Running, serving

MISTAKES = (Violation("node.name", "''; allowed is a name"), Violation("node.region", "''; allowed is a region"))
SERVICES = ("cortex.v1.DiscoveryService", "cortex.v1.WeightService")


class ExampleDiscovery(discovery_pb2_grpc.DiscoveryServiceServicer):
    """Answers with the caller's own identity; the region of the node says how to fail."""

    def __init__(self) -> None:
        self.watching = 0
        self.left = asyncio.Event()

    async def Heartbeat(self, request: Any, context: Any) -> Any:
        if request.node.region == "mistaken":
            raise InvalidArgumentError.of("node", MISTAKES)
        if request.node.region == "away":
            raise UnavailableError("the database is away")
        if request.node.region == "buggy":
            raise KeyError("a detail that must not leave the process")
        if request.node.region == "aborting":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "by hand")
        return discovery_pb2.HeartbeatResponse(lease_s=len(current_identity().name))

    async def Leave(self, request: Any, context: Any) -> Any:
        return discovery_pb2.LeaveResponse()

    async def ListNodes(self, request: Any, context: Any) -> Any:
        return discovery_pb2.ListNodesResponse(nodes=[common_pb2.Node(name=current_identity().uri)])

    async def WatchNodes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watching += 1
        try:
            yield discovery_pb2.WatchNodesResponse(nodes=[common_pb2.Node(name=current_identity().uri)])
            if request.refresh_s:
                raise InvalidArgumentError("refresh_s: 1; allowed is 0", MISTAKES)
            await asyncio.Event().wait()
        finally:
            self.watching -= 1
            self.left.set()


class ExampleWeights(aggregator_pb2_grpc.WeightServiceServicer):
    """Counts the frames of an upload; streams with the reader and writer style of grpc.aio."""

    async def PushUpdate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            yield aggregator_pb2.PushUpdateResponse(resume={"first_chunk": len(request.frame.chunk.sealed)})

    async def PullModel(self, request: Any, context: Any) -> None:
        for index in range(3):
            await context.write(aggregator_pb2.PullModelResponse(frame={"chunk": {"index": index}}))


@dataclass
class Served:
    """The running server and what the tests look at."""

    running: Running
    discovery: ExampleDiscovery
    tls: TlsFiles

    @property
    def address(self) -> str:
        return self.running.address


ServeExample = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve_example(tls_of: Callable[[Role, str], TlsFiles]) -> ServeExample:
    """`async with serve_example(stop_grace_s=…, extra=[attach]) as served:`."""

    @asynccontextmanager
    async def serve(*, extra: Any = (), **changes: Any) -> AsyncIterator[Served]:
        tls = changes.pop("tls", None) or tls_of(Role.DISCOVERY, "d1")
        settings = replace(RpcSettings("127.0.0.1", 0, tls, "cortex", stop_grace_s=0.0), **changes)
        discovery = ExampleDiscovery()
        attach = [
            lambda server: discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(discovery, server),
            lambda server: aggregator_pb2_grpc.add_WeightServiceServicer_to_server(ExampleWeights(), server),
            *extra,
        ]
        async with serving(settings, attach, SERVICES) as running:
            yield Served(running, discovery, tls)

    return serve


@pytest.fixture
async def served(serve_example: ServeExample) -> AsyncIterator[Served]:
    async with serve_example() as made:
        yield made
