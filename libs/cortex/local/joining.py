"""How the members of a local network, and its operator, join it: each with a key of its own and a join token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cortex.local.files import write_text
from cortex.local.layout import Layout
from cortex.local.members import HOST
from cortex.local.network import LocalNetwork
from cortex_common.clock import Clock
from cortex_common.errors import CortexError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network.enrolment import enroll_patiently, is_enrolled
from cortex_common.network.membership import Membership
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of, fingerprints
from cortex_common.security.joining import JoinToken

OPERATOR = NodeName("operator")
TOKEN_LIFE_S = 86_400.0
# A certificate that ends sooner is not worth starting with.
_WORTHWHILE_S = 5.0


@dataclass(frozen=True, slots=True)
class Joiner:
    """Who is to have a certificate of its own, where it keeps that, and the file it finds its join token in."""

    identity: Identity
    region: str
    tls: TlsFiles
    token: Path


def permit_joining(layout: Layout, network: LocalNetwork, clock: Clock) -> None:
    """Make the authority if there is none, and a join token for everybody who has no certificate of it."""
    authority = Authority.open(network.network, layout.authority, network.lives.as_lives())
    enrolment = network.address(Role.DISCOVERY, "enrolment")
    joiners = [
        Joiner(identity, region, layout.tls(identity.name), layout.join_token(identity.name))
        for identity, region in _joiners(network)
    ]
    permit(authority, joiners, enrolment, layout.join_tokens_file, clock)


def permit(
    authority: Authority,
    joiners: Iterable[Joiner],
    enrolment: str,
    tickets_file: Path,
    clock: Clock,
    life_s: float = TOKEN_LIFE_S,
) -> list[Identity]:
    """Give a join token to everybody who has no certificate of the authority; who got one.

    Discovery gets its own certificate from the authority by itself. Tokens are kept where only their owner can read
    them, hashes of them where discovery does.

    Args:
        authority: The network's.
        joiners: Everybody but discovery.
        enrolment: host:port at which discovery enrols.
        tickets_file: What discovery reads.
        clock: What time it is.
        life_s: How long the tokens may be used.
    """
    now_s, tickets, permitted = clock.wall_s(), [], []
    for joiner in joiners:
        if _is_good(joiner.tls, joiner.identity, authority, now_s):
            joiner.token.unlink(missing_ok=True)
            continue
        token = JoinToken.fresh(joiner.identity, joiner.region, enrolment, authority.fingerprint)
        write_text(joiner.token, token.encode() + "\n", mode=0o600)
        permitted.append(joiner.identity)
        tickets.append(
            {
                "id": token.token_id,
                "hash": token.hash,
                "identity": joiner.identity.uri,
                "region": joiner.region,
                "made_s": now_s,
                "expires_s": now_s + life_s,
            }
        )
    write_text(tickets_file, json.dumps({"tickets": tickets}) + "\n", mode=0o600)
    return permitted


def _joiners(network: LocalNetwork) -> Iterator[tuple[Identity, str]]:
    for member in network.members:
        if member.service is not Role.DISCOVERY:
            yield Identity(network.network, member.service, NodeName(member.name)), member.region
    yield Identity(network.network, Role.OPERATOR, OPERATOR), network.regions[0]


def _is_good(tls: TlsFiles, identity: Identity, authority: Authority, now_s: float) -> bool:
    """Whether a member can start with the certificate it has, and renew it."""
    try:
        certificate = certificate_of(tls)
        known = set(fingerprints(tls.ca.read_bytes())) & set(fingerprints(authority.bundle))
    except (CortexError, OSError):
        return False
    lasts = certificate.seconds_left(now_s) > _WORTHWHILE_S
    return certificate.identity == identity and lasts and bool(known) and is_enrolled(tls) and tls.key.exists()


class Operator:
    """The certificate of the person who runs the network: joined, and renewed for as long as the network runs."""

    def __init__(self, layout: Layout, network: LocalNetwork, clock: Clock) -> None:
        self._layout = layout
        self._network = network
        self._clock = clock
        self._tls = layout.tls(OPERATOR)

    async def join(self, stop: asyncio.Event) -> None:
        """Return when there is a certificate.

        Raises:
            CortexError: discovery gives none.
        """
        file = self._layout.join_token(OPERATOR)
        if file.exists():
            token = JoinToken.decode(file.read_text(encoding="ascii"))
            await enroll_patiently(token, self._tls, ("localhost", HOST), self._clock, stop)

    async def keep_after(self, joined: asyncio.Task[None]) -> None:
        """Once there is a certificate, keep it, for ever."""
        await asyncio.wait([joined])
        if joined.cancelled() or joined.exception() is not None:
            return
        kept = self._layout.state(OPERATOR) / "denials.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        await Membership(self._tls, self._network.address(Role.DISCOVERY), kept, self._clock).keep()
