"""How a node gets its first certificate, and every one after that; its private keys are made here and stay here."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.logging import get_logger
from cortex_common.pb.v1 import identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import channel_options, open_channel
from cortex_common.rpc.errors import calling
from cortex_common.rpc.retry import backoff
from cortex_common.security.certificates import (
    certificate_of,
    complete_tls,
    fingerprints,
    hosts_of,
    pinned,
    read_certificate,
    read_file,
    write_tls,
)
from cortex_common.security.issuing import make_request, request_for, write_files
from cortex_common.security.joining import JoinToken
from cortex_common.telemetry.metrics import counter

_log = get_logger(__name__)

RENEWALS = counter("cortex_certificate_renewals_total", "Attempts to renew this node's certificate.", ("result",))
# A counter that is first seen at 1 has not increased: alerts need the zero.
for _result in ("renewed", "failed"):
    RENEWALS.labels(_result)
MARKER = "enrolment.json"
_CALL_S = 15.0
_CONNECT_S = 5.0
# Of the life of a certificate, when it is renewed; half, give or take a tenth, so that nodes do not come all at once.
_RENEW_AT = (0.4, 0.6)
_LONGEST_PAUSE_S = 60.0


def is_enrolled(tls: TlsFiles) -> bool:
    """Whether the certificate is from the network's authority, which renews it, and not from elsewhere."""
    return _marker(tls).exists()


def needs_enrolment(tls: TlsFiles, token: JoinToken, now_s: float) -> bool:
    """Whether a token is to be used: for a node without usable certificate, or one that has been given a new token."""
    try:
        if certificate_of(tls).seconds_left(now_s) <= 0 or not tls.ca.exists() or not tls.key.exists():
            return True
        return bool(json.loads(_marker(tls).read_bytes())["token_id"] != token.token_id)
    except (CortexError, OSError, ValueError, KeyError, TypeError):
        return True


async def enroll(token: JoinToken, tls: TlsFiles, hosts: Sequence[str], *, address: str | None = None) -> None:
    """Join the network: a new key, and a certificate for it, in the files. Repeating it after a failure is right.

    Args:
        token: From the operator.
        tls: Where to put key, certificate and roots.
        hosts: DNS names and addresses at which this node's own server may be reached.
        address: Where to enrol, if not where the token says.

    Raises:
        UnavailableError: nobody answers there.
        UnauthenticatedError: the token is not good, or who answers is not of the authority the token names.
    """
    at = address or token.address
    trusted = pinned(await _roots_offered(at), token.fingerprint)
    key = _joining_key(tls)
    request = identity_pb2.EnrollRequest(
        token_id=token.token_id, secret=token.secret, csr=request_for(key, token.identity.name), hosts=hosts
    )
    async with _unauthenticated_channel(at, trusted) as channel:
        stub: identity_pb2_grpc.EnrollmentServiceAsyncStub = identity_pb2_grpc.EnrollmentServiceStub(channel)
        with calling(f"enrolment at {at}"):
            answer = await stub.Enroll(request, timeout=_CALL_S)
    check_answer(answer, token.identity)
    write_tls(tls, answer.roots, answer.certificate, key)
    write_files([(_marker(tls), json.dumps({"token_id": token.token_id}).encode(), 0o600)])
    _joining_file(tls).unlink(missing_ok=True)
    _log.info("enrolled", identity=token.identity.uri, at=at)


async def enroll_patiently(
    token: JoinToken | None, tls: TlsFiles, hosts: Sequence[str], clock: Clock, stop: asyncio.Event
) -> None:
    """`enroll`, again and again while nobody answers; nothing, without a token or with a certificate from it.

    What a renewal has left that was killed in the middle is put in order before anybody reads it.
    """
    complete_tls(tls)
    if token is None:
        return

    async def attempt() -> None:
        if needs_enrolment(tls, token, clock.wall_s()):
            await enroll(token, tls, hosts)

    def waiting(error: UnavailableError, _wait_s: float) -> None:
        _log.info("enrolment_waits", reason=error.message)

    await backoff(clock, enough=stop.is_set, on_wait=waiting)(attempt)


async def renew(tls: TlsFiles, discovery: str, clock: Clock) -> None:
    """A new key, and a certificate of the same identity for it, in the files; the old ones are replaced.

    Raises:
        CortexError: none was to be had; the old ones are untouched.
    """
    chain = read_file(tls.certificate, "certificate")
    identity = read_certificate(chain).identity
    key, csr = make_request(identity.name)
    async with open_channel(discovery, tls, Role.DISCOVERY, clock=clock) as channel:
        stub: identity_pb2_grpc.IdentityServiceAsyncStub = identity_pb2_grpc.IdentityServiceStub(channel)
        with calling(f"discovery at {discovery}"):
            answer = await stub.Renew(identity_pb2.RenewRequest(csr=csr, hosts=hosts_of(chain)), timeout=_CALL_S)
    check_answer(answer, identity)
    write_tls(tls, answer.roots, answer.certificate, key)
    _log.info("certificate_renewed", identity=identity.uri, until=read_certificate(answer.certificate).not_after)


async def keep_certificate(tls: TlsFiles, discovery: str, clock: Clock) -> None:
    """Renew at half of the certificate's life, again and again, for ever; failures are tried again.

    Files that cannot be read or written for a while end nothing: what was read before is good until it expires.
    """
    failures, reason = 0, ""
    share = random.uniform(*_RENEW_AT)  # noqa: S311 - spreads load, guards nothing
    while True:
        pause_s = min(2.0 ** min(failures, 10), _LONGEST_PAUSE_S) if failures else 0.0
        try:
            leaf = certificate_of(tls)
            wait_s = leaf.seconds_left(clock.wall_s()) - leaf.life_s * (1 - share)
            wait_s, pause_s = max(wait_s, min(pause_s, leaf.life_s / 20)), 0.0
            if wait_s > 0:
                # Not one long sleep: the certificate may be replaced by hand, and clocks may be set.
                await clock.sleep(min(wait_s, _LONGEST_PAUSE_S))
                if wait_s > _LONGEST_PAUSE_S:
                    continue
            await renew(tls, discovery, clock)
        except (CortexError, OSError) as error:
            failures += 1
            RENEWALS.labels("failed").inc()
            if str(error) != reason:
                reason = str(error)
                _log.warning("certificate_not_renewed", reason=reason)
            # Only what cannot be read has not been waited for above.
            await clock.sleep(pause_s)
        else:
            failures, reason = 0, ""
            share = random.uniform(*_RENEW_AT)  # noqa: S311 - spreads load, guards nothing
            RENEWALS.labels("renewed").inc()


async def _roots_offered(address: str) -> bytes:
    """The roots that whoever answers at `address` says are the network's: to be believed by fingerprint only."""
    host, _, port = address.rpartition(":")
    try:
        leaf = await asyncio.to_thread(ssl.get_server_certificate, (host.strip("[]"), int(port)), timeout=_CONNECT_S)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"enrolment at {address} cannot be reached: {error}") from None
    async with _unauthenticated_channel(address, leaf.encode()) as channel:
        stub: identity_pb2_grpc.EnrollmentServiceAsyncStub = identity_pb2_grpc.EnrollmentServiceStub(channel)
        with calling(f"enrolment at {address}"):
            return (await stub.GetRoots(identity_pb2.GetRootsRequest(), timeout=_CALL_S)).roots


def _unauthenticated_channel(address: str, trusted: bytes) -> grpc.aio.Channel:
    """A channel that checks the server and shows no certificate."""
    credentials = grpc.ssl_channel_credentials(root_certificates=trusted)
    return grpc.aio.secure_channel(address, credentials, options=channel_options(Role.DISCOVERY))


def check_answer(answer: identity_pb2.EnrollResponse | identity_pb2.RenewResponse, wanted: Identity) -> None:
    """Refuse what must not take the place of a node's certificate and roots.

    Raises:
        UnauthenticatedError: not a certificate, or another's.
        CorruptError: the roots are none.
    """
    found = read_certificate(answer.certificate).identity
    if found != wanted:
        raise UnauthenticatedError(f"discovery sent a certificate of {found.uri}; asked for was {wanted.uri}")
    fingerprints(answer.roots)


def _joining_key(tls: TlsFiles) -> bytes:
    """The key to join with: the same one at each attempt, since a token is good for one key."""
    path = _joining_file(tls)
    with suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, _ = make_request("joining")
    write_files([(path, key, 0o600)])
    return key


def _joining_file(tls: TlsFiles) -> Path:
    return tls.key.with_name(f"{tls.key.name}.joining")


def _marker(tls: TlsFiles) -> Path:
    return tls.certificate.with_name(MARKER)
