"""Nodes at a real gateway, with a real discovery, in front of a coordinator that does what a test says."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect

from cortex_common.identity import Role, TlsFiles
from cortex_common.job.wire import spec_to_proto
from cortex_common.network import messages as m
from cortex_common.network.protocol import Envelope, TenzroProtocol
from cortex_common.network.websocket_link import GatewayAccess
from cortex_common.pb.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.security.encryption import EncryptionManager
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.sealing import SealingKey
from tests.integration.gateway.conftest import FakeJobs
from tests.integration.worker.gateways import Nodes, node_network
from tests.integration.worker.harness import ScriptedCoordinator, digits_job

TlsOf = Callable[[Role, str], TlsFiles]
PRIVATE = SealingKey("cortex")
KEY = EncryptionManager.new_data_key()


@dataclass
class Gate:
    """A gateway, and what is behind it."""

    nodes: Nodes
    url: str
    coordinator: ScriptedCoordinator
    jobs: FakeJobs
    tokens: dict[str, NodeToken] = field(default_factory=dict)

    async def token(self, name: str) -> NodeToken:
        if name not in self.tokens:
            self.tokens[name] = await self.nodes.token(name)
        return self.tokens[name]

    async def access(self, name: str, **changes: Any) -> GatewayAccess:
        hello = m.Hello(name, "eu", "1")
        values = {"url": self.url, "token": await self.token(name), "hello": hello, "sealing_key": PRIVATE.public.hex()}
        return GatewayAccess(**(values | {"proxy": None} | changes))

    async def introduce(self, name: str, aggregator: str) -> None:
        """Have the gateway hear, by an assignment, which aggregator the node exchanges weights with."""
        await self.coordinator.assign(name, assignment(aggregator))
        async with self.raw(name) as raw:
            while [each.aggregator_address for each in (await raw.expect(m.Assignments)).assignments] != [aggregator]:
                pass

    @asynccontextmanager
    async def raw(self, name: str = "", *, attends: bool = True, **changes: Any) -> AsyncIterator[Raw]:
        """A bare connection; joined, if there is a name."""
        async with connect(self.url, proxy=None, max_size=None, **changes) as connection:
            raw = Raw(connection)
            if name:
                await raw.join(await self.access(name), attends=attends)
            yield raw


class Raw:
    """A node that says exactly what a test wants it to say."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.last_id = 0

    async def join(self, access: GatewayAccess, /, *, attends: bool = True, **changes: Any) -> m.Message:
        challenge = await self.expect(m.Challenge)
        return await self.answer(access, challenge, attends=attends, **changes)

    async def answer(self, access: GatewayAccess, challenge: m.Challenge, /, **changes: Any) -> m.Message:
        hello = access.hello
        proof = access.token.prove(challenge.network, hello.node, access.sealing_key, challenge.challenge)
        values = {
            "version": 1,
            "hello": hello,
            "token_id": access.token.token_id,
            "sealing_key": access.sealing_key,
            "challenge": challenge.challenge,
            "proof": proof,
        }
        await self.send(m.Join(**(values | changes)))
        return (await self.receive()).message

    async def send(self, message: m.Message, ref: int | None = None) -> int:
        self.last_id += 1
        await self.connection.send(TenzroProtocol.encode(Envelope(message, self.last_id, ref)))
        return self.last_id

    async def receive(self) -> Envelope:
        async with asyncio.timeout(20):
            data = await self.connection.recv()
        assert isinstance(data, str), data[:100]
        return TenzroProtocol.decode(data)

    async def expect(self, kind: type[Any]) -> Any:
        """The next message of a kind; others are passed over."""
        while not isinstance(message := (await self.receive()).message, kind):
            pass
        return message

    async def closed(self) -> tuple[int | None, str]:
        """Code and reason of the close that must come."""
        async with asyncio.timeout(20):
            await self.connection.wait_closed()
        return self.connection.close_code, self.connection.close_reason or ""


@asynccontextmanager
async def gate_of(nodes: Nodes, **settings: Any) -> AsyncIterator[Gate]:
    """A scripted coordinator with a gateway in front of it."""
    coordinator, jobs = ScriptedCoordinator(), FakeJobs()

    def attach(server: Any) -> None:
        coordinator.attach(server)
        coordinator_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)

    tls = nodes.tls_of(Role.COORDINATOR, "coordinator-1")
    rpc = RpcSettings("127.0.0.1", 0, tls, "cortex", stop_grace_s=0)
    services = ["cortex.v1.AssignmentService", "cortex.v1.JobService"]
    async with serving(rpc, [attach], services) as server, nodes.gateway(server.address, **settings) as url:
        yield Gate(nodes, url, coordinator, jobs)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gate(tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gate]:
    async with node_network(tls_of, tmp_path_factory.mktemp("nodes")) as nodes, gate_of(nodes) as made:
        yield made


def trusting(authority: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority)


def assignment(aggregator: str = "127.0.0.1:9") -> coordinator_pb2.Assignment:
    """A round of a small job; by default no aggregator is there for it."""
    return coordinator_pb2.Assignment(
        assignment_id="a1",
        job_id="job-1",
        round=1,
        seats=1,
        fence=1,
        job=spec_to_proto(digits_job()),
        data_key=common_pb2.DataKey(key_id=KEY.key_id, epoch=KEY.epoch, key=KEY.key),
        aggregator_address=aggregator,
        aggregator="aggregator-1",
        chunk_elements=1 << 18,
        hold=coordinator_pb2.HoldWork(),
    )
