"""Gateways for nodes without a certificate, with a real discovery that gives them tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex_common.clock import SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.node_tokens import NodeToken
from services.discovery.main import run as run_discovery
from services.discovery.settings import DiscoverySettings
from services.gateway.main import run as run_gateway
from services.gateway.settings import GatewaySettings

TlsOf = Callable[[Role, str], TlsFiles]


def running(run: Callable[..., Coroutine[Any, Any, None]], settings: Any) -> Any:
    """A service in this process, for as long as the block lasts; what it says when it has started."""

    @asynccontextmanager
    async def block() -> AsyncIterator[Any]:
        stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run(settings, SystemClock(), stop, started))
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        try:
            yield started.result()
        finally:
            stop.set()
            await task

    return block()


def files(tls: TlsFiles) -> dict[str, Path]:
    return {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}


@dataclass
class Nodes:
    """Discovery, and gateways in front of coordinators."""

    tls_of: TlsOf
    folder: Path
    discovery: str
    gateways: int = 0

    async def token(self, name: str, region: str = "eu", life_s: float = 0) -> NodeToken:
        tls = self.tls_of(Role.OPERATOR, "ann")
        async with open_channel(self.discovery, tls, Role.DISCOVERY) as channel:
            request = identity_pb2.CreateNodeTokenRequest(name=name, region=region, life_s=life_s)
            answer = await identity_pb2_grpc.IdentityServiceStub(channel).CreateNodeToken(request)
        return NodeToken.decode(answer.token)

    async def revoke(self, name: str) -> None:
        tls = self.tls_of(Role.OPERATOR, "ann")
        async with open_channel(self.discovery, tls, Role.DISCOVERY) as channel:
            request = identity_pb2.RevokeNodeRequest(name=name, reason="lost")
            await identity_pb2_grpc.IdentityServiceStub(channel).RevokeNode(request)

    @asynccontextmanager
    async def gateway(self, coordinator: str, **settings: Any) -> AsyncIterator[str]:
        """A gateway in front of a coordinator; its URL for nodes."""
        self.gateways += 1
        folder = self.folder / f"gateway-{self.gateways}"
        values = {
            "name": "gateway-1",
            "port": 0,
            "websocket_port": 0,
            "state_dir": folder,
            "coordinator": coordinator,
            "discovery": self.discovery,
            "ready_file": folder / "ready.json",
            **files(self.tls_of(Role.GATEWAY, "gateway-1")),
        }
        folder.mkdir()
        async with running(run_gateway, GatewaySettings(**(values | settings))):
            yield json.loads((folder / "ready.json").read_text())["websocket"]


@asynccontextmanager
async def node_network(tls_of: TlsOf, folder: Path, **settings: Any) -> AsyncIterator[Nodes]:
    """A discovery that gives node tokens; certificates come from the tests' own authority."""
    values = {"name": "d1", "port": 0, "state_dir": folder / "discovery", **files(tls_of(Role.DISCOVERY, "d1"))}
    async with running(run_discovery, DiscoverySettings(**values, **settings)) as server:
        yield Nodes(tls_of, folder, server.address)
