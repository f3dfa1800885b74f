"""How a node joins, keeps its certificate, and is shut out: over real TLS, with the real authority."""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from cortex.local.joining import Joiner, permit
from cortex_common.clock import SystemClock
from cortex_common.errors import (
    CortexError,
    InvalidArgumentError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network.enrolment import enroll, is_enrolled, keep_certificate, needs_enrolment, renew
from cortex_common.network.membership import Membership
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc, identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.rpc.server import Running
from cortex_common.security.audit import read_log
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of, fingerprints
from cortex_common.security.joining import JoinToken
from cortex_common.telemetry.resources import Resources, probe_resources
from services.discovery.main import run
from services.discovery.settings import DiscoverySettings
from tests.waiting import eventually

CLOCK = SystemClock()


class Network:
    """A discovery with its authority, and nodes that join it."""

    def __init__(self, folder: Path, server: Running, settings: DiscoverySettings, enrolment: str) -> None:
        self.folder = folder
        self.server = server
        self.settings = settings
        self.enrolment = enrolment
        self.operator = self.files("operator")

    def files(self, name: str) -> TlsFiles:
        return TlsFiles(self.folder / name / "ca.pem", self.folder / name / "tls.crt", self.folder / name / "tls.key")

    @asynccontextmanager
    async def identities(self, tls: TlsFiles) -> AsyncIterator[identity_pb2_grpc.IdentityServiceAsyncStub]:
        async with open_channel(self.server.address, tls, Role.DISCOVERY) as channel:
            with calling("discovery"):
                yield identity_pb2_grpc.IdentityServiceStub(channel)

    async def token(self, role: Role, name: str, **more: object) -> JoinToken:
        async with self.identities(self.operator) as stub:
            request = identity_pb2.CreateJoinTokenRequest(role=f"ROLE_{role.name}", name=name, region="eu", **more)
            return JoinToken.decode((await stub.CreateJoinToken(request)).token)

    async def join(self, role: Role, name: str) -> TlsFiles:
        tls = self.files(name)
        await enroll(await self.token(role, name), tls, ["localhost"])
        return tls

    async def revoke(self, name: str) -> None:
        async with self.identities(self.operator) as stub:
            await stub.RevokeNode(identity_pb2.RevokeNodeRequest(name=name, reason="lost"))

    async def beat(self, tls: TlsFiles, name: str) -> None:
        async with open_channel(self.server.address, tls, Role.DISCOVERY) as channel:
            await beat(channel, name)


async def beat(channel: grpc.aio.Channel, name: str) -> None:
    request = discovery_pb2.HeartbeatRequest()
    request.node.name, request.node.role, request.node.region, request.node.incarnation = name, 4, "eu", "1"
    with calling("discovery"):
        await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(request)


@asynccontextmanager
async def discovery(folder: Path, **changes: object) -> AsyncIterator[Network]:
    """Discovery in a folder that may have held one before; its first operator joined by a token made beforehand."""
    own = folder / "discovery"
    values = {
        "name": "d1",
        "ca": own / "ca.pem",
        "certificate": own / "tls.crt",
        "key": own / "tls.key",
        "state_dir": folder / "state",
        "port": 0,
        "enrolment_port": 0,
        "authority": folder / "authority",
        "join_tokens": folder / "tokens.json",
        "ready_file": folder / "ready.json",
    }
    lives = changes.get("leaf_life_s"), changes.get("issuing_life_s"), changes.get("root_life_s")
    token = None
    if not (folder / "tokens.json").exists():
        authority = Authority.open("cortex", folder / "authority") if lives == (None, None, None) else None
        fingerprint = authority.fingerprint if authority else "0" * 64
        token = JoinToken.fresh(Identity("cortex", Role.OPERATOR, NodeName("ann")), "eu", "?:0", fingerprint)
        ticket = {"id": token.token_id, "hash": token.hash, "identity": token.identity.uri, "region": "eu"}
        ticket |= {"made_s": 0, "expires_s": CLOCK.wall_s() + 3600}
        (folder / "tokens.json").write_text(json.dumps({"tickets": [ticket]}))
    settings = DiscoverySettings(**{**values, **changes})
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(settings, CLOCK, stop, started))
    try:
        await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        network = Network(
            folder, started.result(), settings, json.loads((folder / "ready.json").read_text())["enrolment"]
        )
        if token is not None:
            if token.fingerprint == "0" * 64:
                token = replace(token, fingerprint=Authority("cortex", folder / "authority").fingerprint)
            await enroll(token, network.operator, [], address=network.enrolment)
        yield network
    finally:
        stop.set()
        await task


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    async with discovery(tmp_path) as made:
        yield made


async def test_a_node_joins_with_a_token_and_its_key_stays_where_it_was_made(network: Network) -> None:
    tls = await network.join(Role.WORKER, "eu-1")
    assert certificate_of(tls).identity == Identity("cortex", Role.WORKER, NodeName("eu-1"))
    assert tls.key.stat().st_mode & 0o777 == 0o600
    assert is_enrolled(tls)
    assert 86_000 < certificate_of(tls).seconds_left(CLOCK.wall_s()) <= 86_400
    await network.beat(tls, "eu-1")
    kept = (network.folder / "state" / "identities.json").read_text()
    assert "eu-1" in kept
    assert not list(network.folder.glob("eu-1/*.joining"))


async def test_a_token_is_good_for_one_key_only(network: Network) -> None:
    token = await network.token(Role.WORKER, "eu-1")
    await enroll(token, network.files("eu-1"), [])
    with pytest.raises(UnauthenticatedError, match="has been used"):
        await enroll(token, network.files("thief"), [])
    assert not needs_enrolment(network.files("eu-1"), token, CLOCK.wall_s())


async def test_an_answer_that_was_lost_can_be_asked_for_again(network: Network) -> None:
    token, tls = await network.token(Role.WORKER, "eu-1"), network.files("eu-1")
    await enroll(token, tls, [])
    # As if the first answer had never arrived: the key that asked is still there.
    tls.key.rename(tls.key.with_name("tls.key.joining"))
    tls.certificate.unlink()
    await enroll(token, tls, [])
    await network.beat(tls, "eu-1")


async def test_tokens_written_while_discovery_runs_are_taken_up(network: Network) -> None:
    authority = Authority("cortex", network.folder / "authority")
    identity, tls = Identity("cortex", Role.WORKER, NodeName("late")), network.files("late")
    joiner = Joiner(identity, "eu", tls, network.folder / "late" / "join")
    (network.folder / "tokens.json").write_text("not whole yet")
    assert permit(authority, [joiner], network.enrolment, network.folder / "tokens.json", CLOCK) == [identity]

    # Discovery looks at the file every so often, and bears only so many strangers a second.
    async with asyncio.timeout(20):
        while not tls.certificate.exists():
            with suppress(UnauthenticatedError):
                await enroll(JoinToken.decode(joiner.token.read_text()), tls, [])
            await CLOCK.sleep(0.1)
    await network.beat(tls, "late")
    assert permit(authority, [joiner], network.enrolment, network.folder / "tokens.json", CLOCK) == []
    assert not joiner.token.exists()


@pytest.mark.parametrize("change", [{"secret": b"x" * 32}, {"token_id": "000000000000"}])
async def test_a_guessed_token_is_refused(network: Network, change: dict[str, object]) -> None:
    token = replace(await network.token(Role.WORKER, "eu-1"), **change)
    with pytest.raises(UnauthenticatedError, match="not known here"):
        await enroll(token, network.files("eu-1"), [])
    assert not network.files("eu-1").certificate.exists()


async def test_an_expired_token_is_refused(network: Network) -> None:
    token = await network.token(Role.WORKER, "eu-1", life_s=0.2)
    await CLOCK.sleep(0.25)
    with pytest.raises(UnauthenticatedError, match=r"expired|not known here"):
        await enroll(token, network.files("eu-1"), [])


async def test_who_answers_must_be_of_the_authority_the_token_names(network: Network) -> None:
    token = replace(await network.token(Role.WORKER, "eu-1"), fingerprint="ab" * 32)
    with pytest.raises(UnauthenticatedError, match="no authority there has the fingerprint"):
        await enroll(token, network.files("eu-1"), [])


async def test_a_false_server_with_the_true_roots_gets_no_token(
    network: Network, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token = await network.token(Role.WORKER, "eu-1")
    folder = tmp_path_factory.mktemp("false")
    async with discovery(folder) as false:
        # It hands out the true root too, which is public, and shows a certificate of its own authority.
        own, true = (Authority("cortex", each / "authority").bundle for each in (folder, network.folder))
        (folder / "authority" / "root-0000.crt").write_bytes(true)
        await eventually_async(lambda: roots_at(false.enrolment), own + true)
        with pytest.raises((UnavailableError, UnauthenticatedError)):
            await enroll(token, network.files("eu-1"), [], address=false.enrolment)
    await enroll(token, network.files("eu-1"), [])


async def roots_at(address: str) -> bytes:
    """What an enrolment port hands out, whoever it is; nothing if it renews its certificate at this very moment."""
    leaf = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", int(address.rpartition(":")[2])))
    options = [("grpc.ssl_target_name_override", Role.DISCOVERY.server_name)]
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(leaf.encode()), options) as channel:
        stub = identity_pb2_grpc.EnrollmentServiceStub(channel)
        try:
            return (await stub.GetRoots(identity_pb2.GetRootsRequest())).roots
        except grpc.aio.AioRpcError as error:
            if "CERTIFICATE_VERIFY_FAILED" in (error.details() or ""):
                return b""
            raise


async def eventually_async(ask: Callable[[], Awaitable[bytes]], wanted: bytes) -> None:
    async with asyncio.timeout(10):
        while await ask() != wanted:
            await CLOCK.sleep(0.05)


async def test_the_enrolment_port_answers_nothing_else(network: Network) -> None:
    roots = Authority("cortex", network.folder / "authority").bundle
    credentials = grpc.ssl_channel_credentials(roots)
    options = [("grpc.ssl_target_name_override", Role.DISCOVERY.server_name)]
    async with grpc.aio.secure_channel(network.enrolment, credentials, options) as channel:
        for stub, method, request in (
            (identity_pb2_grpc.IdentityServiceStub, "ListIdentities", identity_pb2.ListIdentitiesRequest()),
            (discovery_pb2_grpc.DiscoveryServiceStub, "ListNodes", discovery_pb2.ListNodesRequest()),
        ):
            with pytest.raises(CortexError, match="does not know this call"), calling("enrolment"):
                await getattr(stub(channel), method)(request)
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(UnauthenticatedError, match="no client certificate"), calling("enrolment"):
            await health(b"")


async def test_a_worker_cannot_become_a_coordinator_by_its_host_names(network: Network) -> None:
    token = await network.token(Role.WORKER, "eu-1")
    with pytest.raises(InvalidArgumentError, match="the roles' own"):
        await enroll(token, network.files("eu-1"), ["coordinator.cortex.internal"])


async def test_renewal_brings_another_key_and_certificate_of_the_same_identity(network: Network) -> None:
    tls = await network.join(Role.WORKER, "eu-1")
    before, key = certificate_of(tls), tls.key.read_bytes()
    await renew(tls, network.server.address, CLOCK)
    after = certificate_of(tls)
    assert (after.identity, after.serial == before.serial) == (before.identity, False)
    assert tls.key.read_bytes() != key
    await network.beat(tls, "eu-1")


async def test_a_certificate_is_renewed_at_half_of_its_life_while_calls_go_on(tmp_path: Path) -> None:
    async with discovery(tmp_path, leaf_life_s=4, issuing_life_s=8, root_life_s=60) as network:
        tls = await network.join(Role.WORKER, "eu-1")
        serials = {certificate_of(tls).serial}
        keeping = asyncio.create_task(keep_certificate(tls, network.server.address, CLOCK))
        async with open_channel(network.server.address, tls, Role.DISCOVERY) as channel:
            while len(serials) < 5 or not any((tmp_path / "authority").glob("issuing-000[2-9].crt")):
                await beat(channel, "eu-1")
                serials.add(certificate_of(tls).serial)
                await CLOCK.sleep(0.05)
        keeping.cancel()


async def test_a_revoked_node_is_refused_and_its_streams_are_cut_at_once(network: Network) -> None:
    tls = await network.join(Role.WORKER, "eu-1")
    await network.beat(tls, "eu-1")
    async with network.identities(tls) as stub:
        answers = aiter(stub.WatchTrust(identity_pb2.WatchTrustRequest(refresh_s=600)))
        await anext(answers)
        await network.revoke("eu-1")
        with pytest.raises(UnauthenticatedError, match=r"eu-1 was revoked \(lost\)"), calling("discovery"):
            await asyncio.wait_for(_last(answers), 5)
    for attempt in (network.beat(tls, "eu-1"), renew(tls, network.server.address, CLOCK)):
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await attempt


async def _last(answers: AsyncIterator[object]) -> None:
    async for _ in answers:
        pass


async def test_a_revocation_reaches_every_member_and_survives_a_restart_of_everything(tmp_path: Path) -> None:
    async with discovery(tmp_path) as network:
        await network.join(Role.WORKER, "eu-1")
        watcher = await network.join(Role.AGGREGATOR, "a1")
        kept = tmp_path / "a1" / "denials.json"
        membership = Membership(watcher, network.server.address, kept, CLOCK)
        keeping = asyncio.create_task(membership.keep())
        await network.revoke("eu-1")
        worker = Identity("cortex", Role.WORKER, NodeName("eu-1"))
        await eventually(lambda: membership.denied.refusal(worker.role, worker.name), 5)
        keeping.cancel()
        # A member that starts while discovery is away knows what it knew.
        assert Membership(watcher, network.server.address, kept, CLOCK).denied.refusal(worker.role, worker.name)
    async with discovery(tmp_path) as again:
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await again.beat(again.files("eu-1"), "eu-1")
        # A new token lets the node in again; what it had before stays worthless.
        old = {path: path.read_bytes() for path in (again.files("eu-1").certificate, again.files("eu-1").key)}
        await again.join(Role.WORKER, "eu-1")
        await again.beat(again.files("eu-1"), "eu-1")
        for path, content in old.items():
            path.write_bytes(content)
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await again.beat(again.files("eu-1"), "eu-1")


async def test_a_new_root_reaches_members_before_they_need_it(network: Network) -> None:
    tls = await network.join(Role.WORKER, "eu-1")
    membership = Membership(tls, network.server.address, network.folder / "denials.json", CLOCK)
    keeping = asyncio.create_task(membership.keep())
    before = fingerprints(tls.ca.read_bytes())
    async with network.identities(network.operator) as stub:
        made = await stub.RotateAuthority(identity_pb2.RotateAuthorityRequest(root=True))
    assert list(made.made) == ["root", "issuing"]
    await eventually(lambda: len(fingerprints(tls.ca.read_bytes())) == 2, 5)
    assert before[0] in fingerprints(tls.ca.read_bytes())
    await network.beat(tls, "eu-1")
    await network.join(Role.WORKER, "eu-2")
    keeping.cancel()


async def test_an_authority_that_is_replaced_by_age_is_in_the_audit_log(tmp_path: Path) -> None:
    def records() -> list[Mapping[str, Any]]:
        return [each for each in read_log(tmp_path / "state" / "audit") if each["what"] == "authority rotated"]

    async with discovery(tmp_path, leaf_life_s=4, issuing_life_s=8, root_life_s=3600):
        await eventually(lambda: bool(records()), 30)
    first = records()[0]
    assert (first["who"], first["decision"]) == ("spiffe://cortex/discovery/d1", "allowed")
    assert (first["about"], first["reason"]) == ("authority=issuing", "the one before is due for replacement")


async def test_where_certificates_come_from_elsewhere_there_is_revocation_only(tmp_path: Path, tls_of: object) -> None:
    own, operator = tls_of(Role.DISCOVERY, "d1"), tls_of(Role.OPERATOR, "ann")  # type: ignore[operator]
    worker = tls_of(Role.WORKER, "w1")  # type: ignore[operator]
    (tmp_path / "tokens.json").write_text('{"tickets": []}')
    (tmp_path / "ready.json").write_text('{"enrolment": ""}')
    changes = {"authority": None, "ca": own.ca, "certificate": own.certificate, "key": own.key}
    async with discovery(tmp_path, **changes) as network:
        network.operator = operator
        with pytest.raises(PreconditionError, match="certificates come from elsewhere"):
            await renew(worker, network.server.address, CLOCK)
        await network.beat(worker, "w1")
        await network.revoke("w1")
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await network.beat(worker, "w1")


async def test_a_token_in_the_file_is_not_good_again_after_its_node_was_revoked(tmp_path: Path) -> None:
    identity = Identity("cortex", Role.WORKER, NodeName("eu-1"))
    async with discovery(tmp_path) as network:
        joiner = Joiner(identity, "eu", network.files("eu-1"), tmp_path / "eu-1.join")
        authority, tokens = Authority("cortex", tmp_path / "authority"), tmp_path / "tokens.json"
        permit(authority, [joiner], network.enrolment, tokens, CLOCK)
        token = JoinToken.decode(joiner.token.read_text())
        async with asyncio.timeout(30):
            while not joiner.tls.certificate.exists():
                with suppress(UnauthenticatedError):
                    await enroll(token, joiner.tls, [])
                await CLOCK.sleep(0.1)
        await network.revoke("eu-1")
        with pytest.raises(UnauthenticatedError, match="not known here"):
            await enroll(token, network.files("thief"), [])
    # Discovery reads the file of tokens again when it starts.
    async with discovery(tmp_path) as again:
        with pytest.raises(UnauthenticatedError, match="not known here"):
            await enroll(token, again.files("thief"), [], address=again.enrolment)
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            await again.beat(joiner.tls, "eu-1")
        async with again.identities(again.operator) as stub:
            known = await stub.ListIdentities(identity_pb2.ListIdentitiesRequest())
        assert [each.identity for each in known.tokens] == []


async def test_discovery_goes_on_while_its_machine_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def probe(disk: Path) -> Resources:
        looks.append(disk)
        if len(looks) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return probe_resources(disk)

    monkeypatch.setattr("services.discovery.main.probe_resources", probe)
    async with discovery(tmp_path, heartbeat_s=0.1) as network:
        await eventually(lambda: len(looks) > 3, 30)
        await network.join(Role.WORKER, "eu-1")
