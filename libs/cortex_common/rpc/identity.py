"""Who is calling: the peer's certificate, checked at every call."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from cortex_common.errors import UnauthenticatedError
from cortex_common.identity import Identity
from cortex_common.security.certificates import Certificate, read_certificate

# Who a gateway asks for, and how far they may see; believed from gateways only.
PRINCIPAL_KEY = "cortex-principal"
ORG_KEY = "cortex-org"
REACH_KEY = "cortex-reach"
REACH_ALL = "all"

_caller: ContextVar[Identity | None] = ContextVar("cortex_caller", default=None)


def current_identity() -> Identity:
    """The identity of whoever made the RPC now being served.

    Raises:
        UnauthenticatedError: no RPC is being served here.
    """
    identity = _caller.get()
    if identity is None:
        raise UnauthenticatedError("no caller: this code runs outside an RPC")
    return identity


@contextmanager
def acting_as(identity: Identity) -> Iterator[None]:
    """Make `current_identity()` answer `identity` inside the block."""
    token = _caller.set(identity)
    try:
        yield
    finally:
        _caller.reset(token)


def authenticate(auth_context: Mapping[str, Iterable[bytes]], network: str, now_s: float) -> Certificate:
    """The certificate the peer proved to own when it connected, still good at `now_s` and of this network.

    Args:
        auth_context: What gRPC knows about the connection.
        network: The network (trust domain) that callers must belong to.
        now_s: Wall time in seconds.

    Raises:
        UnauthenticatedError: no certificate, expired since the connection was made, or of another network.
    """
    pems = list(auth_context.get("x509_pem_cert", ()))
    if not pems:
        raise UnauthenticatedError("no client certificate: connect with mutual TLS", "no_certificate")
    certificate = read_certificate(pems[0])
    identity = certificate.identity
    if identity.network != network:
        raise UnauthenticatedError(f"{identity.uri} belongs to another network; this one is {network!r}", "network")
    if certificate.seconds_left(now_s) <= 0:
        raise UnauthenticatedError(expired(certificate), "expired")
    if now_s < certificate.not_before.timestamp():
        start = certificate.not_before.isoformat(timespec="seconds")
        message = f"certificate of {identity.uri} is not valid before {start}: compare the clocks"
        raise UnauthenticatedError(message, "not_yet_valid")
    return certificate


def expired(certificate: Certificate) -> str:
    """Sentence that says when a certificate ended."""
    end = certificate.not_after.astimezone(dt.UTC).isoformat(timespec="seconds")
    return f"certificate of {certificate.identity.uri} expired at {end}: renew it and connect again"
