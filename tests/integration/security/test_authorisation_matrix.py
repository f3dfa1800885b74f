"""Every RPC of every running server × every role × every kind of caller who should not get in.

The RPCs are what the servers themselves say they serve, by reflection: one that nobody declared fails here.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import identity_pb2
from cortex_common.rpc.authorisation import ALLOWED, ANYBODY, OPEN_SERVICES, PRIVILEGED, allowed_roles
from cortex_common.rpc.channel import open_sync_channel
from cortex_common.security.audit import read_log
from cortex_common.security.audit_check import check_log
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of
from tests.integration.security.conftest import CLOCK, Guarded

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVERS = (Role.COORDINATOR, Role.AGGREGATOR, Role.DISCOVERY)
UNAUTHENTICATED, FORBIDDEN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE
ANSWER_S = 10.0


@dataclass(frozen=True)
class Rpc:
    """One method of one running server."""

    server: Role
    method: str
    streams: tuple[bool, bool]
    """Whether requests, and whether answers, are many."""


@dataclass(frozen=True)
class Answer:
    """How a call ended; OK when something came back."""

    code: grpc.StatusCode
    detail: str = ""


async def call(channel: grpc.Channel, rpc: Rpc) -> Answer:
    """Call with an empty request, and wait for the first answer.

    On a thread: grpc.aio tells INTERNAL instead of what the server said when it ends a call before a request of a
    stream is written, which is what a refusal does (grpc/grpc#36066).
    """
    return await asyncio.to_thread(_call, channel, rpc)


def _call(channel: grpc.Channel, rpc: Rpc) -> Answer:
    many_requests, many_answers = rpc.streams
    kind = f"{'stream' if many_requests else 'unary'}_{'stream' if many_answers else 'unary'}"
    start = partial(getattr(channel, kind)(rpc.method), iter([b""]) if many_requests else b"", timeout=ANSWER_S)
    try:
        if not many_answers:
            start()
            return Answer(grpc.StatusCode.OK)
        opened = start()
        try:
            return Answer(opened.code(), opened.details()) if next(opened, None) is None else Answer(grpc.StatusCode.OK)
        finally:
            opened.cancel()
    except grpc.RpcError as error:
        return Answer(error.code(), error.details() or "")


def reflected(guarded: Guarded) -> list[Rpc]:
    """What the servers serve, by their own word."""
    found = []
    for server in SERVERS:
        with open_sync_channel(guarded.servers[server], guarded.certificate(Role.OPERATOR), server) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            for service in database.get_services():
                file = database.FindFileContainingSymbol(service)
                described = next(each for each in file.service if f"{file.package}.{each.name}" == service)
                for method in described.method:
                    streams = (method.client_streaming, method.server_streaming)
                    found.append(Rpc(server, f"/{service}/{method.name}", streams))
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rpcs(guarded: Guarded) -> list[Rpc]:
    return await asyncio.to_thread(reflected, guarded)


async def verdicts(guarded: Guarded, rpcs: Iterable[Rpc], tls: TlsFiles | None) -> AsyncIterator[tuple[Rpc, Answer]]:
    """Every RPC, called by the owner of a certificate."""
    for server in SERVERS:
        with guarded.unchecked(server, tls) as channel:
            for rpc in rpcs:
                if rpc.server is server:
                    yield rpc, await call(channel, rpc)


def is_ours(rpc: Rpc) -> bool:
    return rpc.method.split("/")[1] not in OPEN_SERVICES


async def test_what_is_served_is_what_is_declared(rpcs: list[Rpc]) -> None:
    served = {rpc.method for rpc in rpcs if is_ours(rpc)}
    assert len(served) > 25
    assert served == set(ALLOWED) - ANYBODY, "declare each RPC in rpc/authorisation.py"


@pytest.mark.parametrize("role", Role)
async def test_each_role_may_call_what_the_table_says_and_nothing_else(
    guarded: Guarded, rpcs: list[Rpc], role: Role
) -> None:
    wrong, refused = [], 0
    async for rpc, answer in verdicts(guarded, rpcs, guarded.certificate(role)):
        is_refused = answer.code is FORBIDDEN and "may not call" in answer.detail
        refused += is_refused
        if is_refused == (role in allowed_roles(rpc.method)) or answer.code in (UNAUTHENTICATED, NO_CONNECTION):
            wrong.append((rpc.method, answer))
    assert wrong == []
    assert refused > 3


Maker = Callable[[Guarded, Role], TlsFiles | None]


def _foreign(guarded: Guarded, role: Role) -> TlsFiles:
    folder = guarded.folder / "foreign"
    authority = Authority.open("cortex", folder / "authority")
    return authority.issue(Identity("cortex", role, NodeName("n1")), [], folder / role.value)


OUTSIDERS: dict[str, Maker] = {
    "no certificate": lambda guarded, role: None,
    "a foreign authority's": _foreign,
    "expired": lambda guarded, role: guarded.certificate(role, "old", life=dt.timedelta(seconds=-1)),
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", OUTSIDERS)
async def test_without_a_good_certificate_no_connection_is_made(
    guarded: Guarded, rpcs: list[Rpc], kind: str, role: Role
) -> None:
    tls = OUTSIDERS[kind](guarded, role)
    wrong = [
        (rpc.method, answer)
        async for rpc, answer in verdicts(guarded, rpcs, tls)
        if answer.code is not NO_CONNECTION or not _is_tls_failure(answer.detail)
    ]
    assert wrong == []


def _is_tls_failure(detail: str) -> bool:
    return any(word in detail.lower() for word in ("handshake", "certificate", "ssl", "socket closed", "reset"))


@pytest.mark.parametrize("role", Role)
async def test_a_member_of_another_network_is_refused_every_call(guarded: Guarded, rpcs: list[Rpc], role: Role) -> None:
    other = guarded.certificate(role, network="other")
    await _all_refused(guarded, rpcs, other, "belongs to another network")


@pytest.mark.parametrize("role", Role)
async def test_a_revoked_member_is_refused_every_call(guarded: Guarded, rpcs: list[Rpc], role: Role) -> None:
    tls = guarded.certificate(role, "revoked")
    await guarded.revoke(role, "revoked")
    for server in SERVERS:
        await _until_refused(guarded, server, tls, "was revoked")
    await _all_refused(guarded, rpcs, tls, "was revoked")


async def test_a_certificate_that_expires_in_an_open_connection_is_refused_every_call_from_then_on(
    guarded: Guarded, rpcs: list[Rpc]
) -> None:
    life = dt.timedelta(seconds=1.5)
    files = {role: guarded.certificate(role, "brief", life=life) for role in Role}
    channels = {(server, role): guarded.unchecked(server, files[role]) for server in SERVERS for role in Role}
    health = Rpc(Role.DISCOVERY, "/grpc.health.v1.Health/Check", (False, False))
    connected = await asyncio.gather(*(call(channel, health) for channel in channels.values()))
    assert {answer.code for answer in connected} == {grpc.StatusCode.OK}
    await CLOCK.sleep(max(certificate_of(tls).seconds_left(CLOCK.wall_s()) for tls in files.values()) + 0.05)
    wrong = []
    for (server, role), channel in channels.items():
        for rpc in rpcs:
            if rpc.server is server:
                answer = await call(channel, rpc)
                if answer.code is not UNAUTHENTICATED or "expired at" not in answer.detail:
                    wrong.append((role, rpc.method, answer))
        channel.close()
    assert wrong == []


async def _until_refused(guarded: Guarded, server: Role, tls: TlsFiles, why: str) -> None:
    """Members hear of a revocation within seconds."""
    health = Rpc(server, "/grpc.health.v1.Health/Check", (False, False))
    with guarded.unchecked(server, tls) as channel:
        async with asyncio.timeout(10):
            while why not in (await call(channel, health)).detail:
                await CLOCK.sleep(0.05)


async def _all_refused(guarded: Guarded, rpcs: list[Rpc], tls: TlsFiles, why: str) -> None:
    wrong = [
        (rpc.method, answer)
        async for rpc, answer in verdicts(guarded, rpcs, tls)
        if answer.code is not UNAUTHENTICATED or why not in answer.detail
    ]
    assert wrong == []


def _enrolment_rpcs(rpcs: Iterable[Rpc]) -> Iterator[Rpc]:
    """Everything there is, asked at the port where callers need no certificate."""
    yield from rpcs
    for method in identity_pb2.DESCRIPTOR.services_by_name["EnrollmentService"].methods:
        yield Rpc(Role.DISCOVERY, f"/cortex.v1.EnrollmentService/{method.name}", (False, False))


async def test_the_enrolment_port_lets_anybody_do_what_anybody_may_and_nothing_else(
    guarded: Guarded, rpcs: list[Rpc]
) -> None:
    options = [("grpc.ssl_target_name_override", Role.DISCOVERY.server_name)]
    credentials = grpc.ssl_channel_credentials(guarded.authority.bundle)
    answers: dict[str, Answer] = {}
    with grpc.secure_channel(guarded.enrolment, credentials, options) as channel:
        for rpc in _enrolment_rpcs(rpcs):
            answers[rpc.method] = await call(channel, rpc)
    assert answers.pop("/cortex.v1.EnrollmentService/GetRoots").code is grpc.StatusCode.OK
    enrolled = answers.pop("/cortex.v1.EnrollmentService/Enroll")
    assert enrolled.code in (UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT), enrolled
    codes = {method: answer.code for method, answer in answers.items()}
    assert set(codes.values()) <= {grpc.StatusCode.UNIMPLEMENTED, UNAUTHENTICATED}, codes


async def test_the_refusals_are_in_the_audit_logs(guarded: Guarded, rpcs: list[Rpc]) -> None:
    stranger = guarded.certificate(Role.WORKER, "curious")
    for server in SERVERS:
        forbidden = [rpc for rpc in rpcs if rpc.server is server and Role.WORKER not in allowed_roles(rpc.method)]
        with guarded.unchecked(server, stranger) as channel:
            for rpc in forbidden:
                await call(channel, rpc)
        log: Path = guarded.state(server) / "audit"
        wanted = {rpc.method for rpc in forbidden}
        async with asyncio.timeout(10):
            while not wanted <= {
                record["what"] for record in read_log(log) if record.get("who", "").endswith("/worker/curious")
            }:
                await CLOCK.sleep(0.02)
        assert check_log(log).problems == []


async def test_every_privileged_call_that_is_let_in_is_in_the_audit_logs(guarded: Guarded, rpcs: list[Rpc]) -> None:
    caller = guarded.certificate(Role.OPERATOR, "bold")
    for server in SERVERS:
        mine = {rpc for rpc in rpcs if rpc.server is server and Role.OPERATOR in allowed_roles(rpc.method)}
        privileged = {rpc.method for rpc in mine if rpc.method in PRIVILEGED}
        assert privileged
        with guarded.unchecked(server, caller) as channel:
            codes = {rpc.method: (await call(channel, rpc)).code.name for rpc in mine}
        # Each record is on the disk before its call is answered: there is nothing to wait for.
        log = read_log(guarded.state(server) / "audit")
        records = [each for each in log if each.get("who", "").endswith("/operator/bold")]
        assert {each["what"]: (each["decision"], each["code"]) for each in records} == {
            method: ("allowed", codes[method]) for method in privileged
        }
