"""Nodes without a certificate: their tokens, and the passes a gateway speaks for them with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from cortex_common.errors import (
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.identity import Role, TlsFiles
from cortex_common.network.enrolment import make_request
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc, identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.security.certificates import read_file
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.passes import read_pass, sign_pass
from tests.integration.discovery.test_enrolment import CLOCK, Network, discovery
from tests.waiting import eventually

SEALING_KEY = "ab" * 32


class Gate:
    """A gateway as far as discovery sees one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.identities = identity_pb2_grpc.IdentityServiceStub(channel)
        self.nodes = discovery_pb2_grpc.DiscoveryServiceStub(channel)

    async def challenge(self) -> bytes:
        return (await self.identities.ChallengeNode(identity_pb2.ChallengeNodeRequest())).challenge

    async def admit(self, token: NodeToken, node: str = "ws1", challenge: bytes | None = None, **other: str) -> bytes:
        challenge = challenge or await self.challenge()
        values = {"node": node, "region": "eu", "token_id": token.token_id, "sealing_key": SEALING_KEY}
        values |= {"proof": token.prove("cortex", node, SEALING_KEY, challenge.hex())} | other
        with calling("discovery"):
            return getattr(
                await self.identities.AdmitNode(identity_pb2.AdmitNodeRequest(challenge=challenge, **values)), "pass"
            )

    async def beat(self, given: bytes, node: str = "ws1") -> None:
        request = discovery_pb2.HeartbeatRequest()
        request.node.name, request.node.role, request.node.region, request.node.incarnation = node, 4, "eu", "1"
        with calling("discovery"):
            await self.nodes.Heartbeat(request, metadata=(("cortex-pass-bin", given),))


@asynccontextmanager
async def gate(network: Network, tls: TlsFiles) -> AsyncIterator[Gate]:
    async with open_channel(network.server.address, tls, Role.DISCOVERY) as channel:
        yield Gate(channel)


async def node_token(network: Network, name: str = "ws1", life_s: float = 0) -> NodeToken:
    async with network.identities(network.operator) as stub:
        request = identity_pb2.CreateNodeTokenRequest(name=name, region="eu", life_s=life_s)
        return NodeToken.decode((await stub.CreateNodeToken(request)).token)


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    async with discovery(tmp_path) as made:
        yield made


@pytest.fixture
async def gateway(network: Network) -> AsyncIterator[Gate]:
    async with gate(network, await network.join(Role.GATEWAY, "gateway-1")) as made:
        yield made


async def test_a_gateway_speaks_for_a_node_that_proved_its_token(network: Network, gateway: Gate) -> None:
    token = await node_token(network)
    await gateway.beat(await gateway.admit(token))
    async with network.identities(network.operator) as stub:
        known = await stub.ListIdentities(identity_pb2.ListIdentitiesRequest())
    assert "spiffe://cortex/worker/ws1" in [each.identity for each in known.identities]
    kept = (network.folder / "state" / "identities.json").read_text()
    assert token.token_id in kept
    assert token.secret.hex() not in kept


async def refused(attempt: object, kind: type[CortexError], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        await attempt  # type: ignore[misc]


async def test_who_cannot_prove_a_token_gets_no_pass(network: Network, gateway: Gate) -> None:
    token = await node_token(network)
    stranger = NodeToken.fresh()
    await refused(gateway.admit(stranger), UnauthenticatedError, "not known here")
    wrong = NodeToken(token.token_id, stranger.secret)
    await refused(gateway.admit(wrong), UnauthenticatedError, "proof is wrong")
    await refused(gateway.admit(token, sealing_key="cd" * 32), UnauthenticatedError, "proof is wrong")
    await refused(gateway.admit(token, sealing_key="short"), InvalidArgumentError, "sealing_key")
    await refused(gateway.admit(token, node="ws2"), ForbiddenError, "is for 'ws1' in 'eu'")
    await refused(gateway.admit(token, region="us"), ForbiddenError, "is for 'ws1' in 'eu'")
    challenge = await gateway.challenge()
    await gateway.admit(token, challenge=challenge)
    await refused(gateway.admit(token, challenge=challenge), UnavailableError, "challenge is not open")
    async with gate(network, await network.join(Role.GATEWAY, "gateway-2")) as other:
        challenge = await other.challenge()
        await refused(gateway.admit(token, challenge=challenge), UnavailableError, "challenge is not open")


async def test_an_expired_token_is_refused_by_that_reason(network: Network, gateway: Gate) -> None:
    token = await node_token(network, life_s=0.5)
    given = await gateway.admit(token)
    ends_s = CLOCK.wall_s() + 0.5
    await eventually(lambda: CLOCK.wall_s() >= ends_s)
    await refused(gateway.admit(token), UnauthenticatedError, "has expired")
    await refused(gateway.beat(given), UnauthenticatedError, "pass for spiffe://cortex/worker/ws1 has expired")


async def test_a_pass_is_good_for_its_gateway_its_node_and_its_calls(network: Network, gateway: Gate) -> None:
    given = await gateway.admit(await node_token(network))
    await refused(gateway.beat(given, "ws2"), ForbiddenError, "worker 'ws2' given")
    async with gate(network, await network.join(Role.GATEWAY, "gateway-2")) as other:
        await refused(other.beat(given), UnauthenticatedError, "is for spiffe://cortex/gateway/gateway-1")
    _, csr = make_request("ws1")
    with pytest.raises(ForbiddenError, match="cannot be called for another node"), calling("discovery"):
        await gateway.identities.Renew(identity_pb2.RenewRequest(csr=csr), metadata=(("cortex-pass-bin", given),))
    for broken in (b"", b"{}", b"[1]", given[:-1], given.replace(b"ws1", b"ws2"), given.replace(b"gateway-1", b"g1")):
        await refused(gateway.beat(broken), UnauthenticatedError, "pass")


async def test_a_pass_signed_by_another_node_is_refused(network: Network, gateway: Gate) -> None:
    given = read_pass(
        await gateway.admit(await node_token(network)), read_file(network.operator.ca, "ca"), CLOCK.wall_s()
    )
    forged = sign_pass(given, await network.join(Role.GATEWAY, "gateway-3"))
    await refused(gateway.beat(forged), UnauthenticatedError, "allowed: discovery of the network")


async def test_who_is_revoked_is_out_until_there_is_a_new_token(network: Network, gateway: Gate) -> None:
    token = await node_token(network)
    given = await gateway.admit(token)
    await network.revoke("ws1")
    await refused(gateway.beat(given), UnauthenticatedError, "was revoked")
    await refused(gateway.admit(token), UnauthenticatedError, "not known here")
    fresh = await node_token(network)
    await refused(gateway.beat(given), UnauthenticatedError, "was revoked")
    await gateway.beat(await gateway.admit(fresh))


async def test_tokens_outlive_a_restart_of_discovery(tmp_path: Path) -> None:
    async with discovery(tmp_path) as network:
        token = await node_token(network)
        tls = await network.join(Role.GATEWAY, "gateway-1")
    async with discovery(tmp_path) as network, gate(network, tls) as gateway:
        await gateway.beat(await gateway.admit(token))
