"""Every server of a network, as they really run, and callers who should and should not get in."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cortex_common.clock import SystemClock
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import channel_options, open_channel
from cortex_common.security.authority import Authority
from cortex_common.security.tokens import TokenStore
from services.aggregator.main import run as run_aggregator
from services.aggregator.settings import AggregatorSettings
from services.coordinator.main import run as run_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.discovery.main import run as run_discovery
from services.discovery.settings import DiscoverySettings
from services.gateway.main import run as run_gateway
from services.gateway.settings import GatewaySettings
from tests.conftest import HOSTS, NETWORK

CLOCK = SystemClock()


@dataclass
class Guarded:
    """Addresses of the running servers, and the authority that makes certificates for whoever wants to call them."""

    folder: Path
    authority: Authority
    servers: dict[Role, str] = field(default_factory=dict)
    enrolment: str = ""
    http: str = ""

    def certificate(
        self, role: Role, name: str = "", *, network: str = NETWORK, life: dt.timedelta | None = None
    ) -> TlsFiles:
        """A certificate of the network's own authority."""
        identity = Identity(network, role, NodeName(name or f"{role.value}-1"))
        folder = self.folder / "certificates" / network / role.value / identity.name
        if life is None and (folder / "tls.crt").exists():
            return TlsFiles(self.authority.ca, folder / "tls.crt", folder / "tls.key")
        issuer = self.authority if network == NETWORK else Authority(network, self.authority.directory)
        return issuer.issue(identity, HOSTS, folder, **({} if life is None else {"life": life}))

    @property
    def tokens(self) -> TokenStore:
        """The gateway's."""
        return TokenStore(self.folder / "gateway" / "tokens.json")

    def state(self, role: Role) -> Path:
        """Where a service keeps what it must not forget."""
        return self.folder / role.value

    def unchecked(self, server: Role, tls: TlsFiles | None) -> grpc.Channel:
        """A channel of somebody who does not look at their own certificate first."""
        key, chain = (tls.key.read_bytes(), tls.certificate.read_bytes()) if tls else (None, None)
        credentials = grpc.ssl_channel_credentials(self.authority.bundle, key, chain)
        return grpc.secure_channel(self.servers[server], credentials, channel_options(server))

    async def revoke(self, role: Role, name: str) -> None:
        """Shut a node out."""
        operator = self.certificate(Role.OPERATOR)
        async with open_channel(self.servers[Role.DISCOVERY], operator, Role.DISCOVERY) as channel:
            request = identity_pb2.RevokeNodeRequest(name=name, role=f"ROLE_{role.name}", reason="lost")
            await identity_pb2_grpc.IdentityServiceStub(channel).RevokeNode(request)


@asynccontextmanager
async def guarded_network(folder: Path) -> AsyncIterator[Guarded]:
    """Discovery with its authority, a coordinator, an aggregator and a gateway, on free ports."""
    made = Guarded(folder, Authority.create(NETWORK, folder / "authority"))

    def common(role: Role) -> dict[str, object]:
        tls = made.certificate(role)
        files = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
        return {"name": f"{role.value}-1", "state_dir": made.state(role), "port": 0, **files}

    async with AsyncExitStack() as stack:

        async def start(run: Callable[..., object], settings: object) -> object:
            return await stack.enter_async_context(_running(run, settings))

        ready = folder / "ready.json"
        with_authority = {"authority": folder / "authority", "enrolment_port": 0, "ready_file": ready}
        server = await start(run_discovery, DiscoverySettings(**common(Role.DISCOVERY), **with_authority))
        made.servers[Role.DISCOVERY] = discovery = server.address  # type: ignore[attr-defined]
        made.enrolment = _json(ready)["enrolment"]
        server = await start(run_coordinator, CoordinatorSettings(**common(Role.COORDINATOR), discovery=discovery))
        made.servers[Role.COORDINATOR] = coordinator = server.address  # type: ignore[attr-defined]
        server = await start(run_aggregator, AggregatorSettings(**common(Role.AGGREGATOR), discovery=discovery))
        made.servers[Role.AGGREGATOR] = server.address  # type: ignore[attr-defined]
        peers = {"coordinator": coordinator, "discovery": discovery, "websocket_port": 0}
        patient = {"requests_burst": 1000.0, "bad_tokens_burst": 1000.0}
        http = await start(run_gateway, GatewaySettings(**common(Role.GATEWAY), **peers, **patient))
        made.http = http.url  # type: ignore[attr-defined]
        yield made


@asynccontextmanager
async def _running(run: Callable[..., object], settings: object) -> AsyncIterator[object]:
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(settings, CLOCK, stop, started))  # type: ignore[arg-type]
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield started.result()
    finally:
        stop.set()
        await task


def _json(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    """One network for all tests of a file."""
    async with guarded_network(tmp_path_factory.mktemp("guarded")) as network:
        yield network
