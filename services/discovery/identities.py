"""Who may belong to the network: open join tokens, certificates in use, who is shut out. Pure: time is an argument."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cortex_common.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnauthenticatedError,
)
from cortex_common.identity import Identity, Role

MAX_TOKEN_LIFE_S = 30 * 86400.0
MAX_NODE_TOKEN_LIFE_S = 366 * 86400.0
MAX_OPEN_TOKENS = 10_000
MAX_REASON = 200
MAX_CERTIFICATES = 100
"""Of an identity, that have not ended. It needs two, and one more for each copy of its files that renews by itself."""
_KEPT_S = 30 * 86400.0
_REVOKED = "revoked"
"""Stands for the key that a token of somebody shut out was used by."""
# Numbers of node tokens are short, those of certificates have 159 bits.
_TOKEN_BITS = 64
_ROOM_AGAIN_S = 60


@dataclass(frozen=True, slots=True)
class Ticket:
    """What is kept of a join token.

    Attributes:
        token_id: Its public name.
        hash: Of its secret.
        identity, region: Who may join with it, where.
        expires_s: Wall time.
        made_s: Wall time.
        used_by: Digest of the key that joined with it; that key may come again, in case the answer was lost.
            `revoked` if its node was shut out since.
    """

    token_id: str
    hash: str
    identity: Identity
    region: str
    expires_s: float
    made_s: float
    used_by: str = ""


@dataclass(frozen=True, slots=True)
class NodeKey:
    """What is kept of a node token: enough to check its proofs, not to make one.

    Attributes:
        token_id: Its public name.
        public_key: Of the key derived from it; hexadecimal.
        identity, region: Whose it is.
        expires_s: Wall time.
    """

    token_id: str
    public_key: str
    identity: Identity
    region: str
    expires_s: float


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate in use, or a node token, under its number."""

    serial: int
    issued_s: float
    expires_s: float


@dataclass(frozen=True, slots=True)
class Revocation:
    """Somebody shut out: entirely, or, once let in again, with the certificates from before."""

    at_s: float
    reason: str
    by: str
    serials: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Identities:
    """Everything that is known of who belongs to the network; replaced as a whole."""

    tickets: Mapping[str, Ticket] = field(default_factory=dict)
    issued: Mapping[Identity, tuple[Issued, ...]] = field(default_factory=dict)
    regions: Mapping[Identity, str] = field(default_factory=dict)
    revoked: Mapping[Identity, Revocation] = field(default_factory=dict)
    node_keys: Mapping[str, NodeKey] = field(default_factory=dict)


def with_ticket(state: Identities, ticket: Ticket, now_s: float) -> Identities:
    """One more open token.

    Raises:
        InvalidArgumentError: it lives too long, or there are too many.
        AlreadyExistsError: the name belongs to a node of another role.
    """
    life_s = ticket.expires_s - now_s
    if not 0 < life_s <= MAX_TOKEN_LIFE_S:
        raise InvalidArgumentError(f"life_s: {life_s:g} given; allowed: above 0, up to {MAX_TOKEN_LIFE_S:g}")
    if len(state.tickets) >= MAX_OPEN_TOKENS:
        raise InvalidArgumentError(f"{len(state.tickets)} join tokens are open; allowed: {MAX_OPEN_TOKENS}")
    _require_free(state, ticket.identity)
    return replace(state, tickets={**state.tickets, ticket.token_id: ticket})


def with_node_key(state: Identities, key: NodeKey, made: Issued) -> Identities:
    """One more node token. Its node, if it was shut out, is let in again, with nothing from before.

    Raises:
        InvalidArgumentError: it lives too long, or there are too many.
        AlreadyExistsError: the name belongs to a node of another role.
    """
    life_s = made.expires_s - made.issued_s
    if not 0 < life_s <= MAX_NODE_TOKEN_LIFE_S:
        raise InvalidArgumentError(f"life_s: {life_s:g} given; allowed: above 0, up to {MAX_NODE_TOKEN_LIFE_S:g}")
    if len(state.node_keys) >= MAX_OPEN_TOKENS:
        raise InvalidArgumentError(f"{len(state.node_keys)} node tokens are in use; allowed: {MAX_OPEN_TOKENS}")
    _require_free(state, key.identity)
    state = _readmitted(state, key.identity)
    state = with_certificate(state, key.identity, key.region, made)
    return replace(state, node_keys={**state.node_keys, key.token_id: key})


def proven(state: Identities, token_id: str, node: str, region: str, now_s: float) -> NodeKey:
    """The node token that a node says it has; whether it has it, only its proof can say.

    Raises:
        UnauthenticatedError: it is unknown or expired.
        ForbiddenError: it is another node's, or of another region.
    """
    key = state.node_keys.get(token_id)
    if key is None:
        raise UnauthenticatedError("this node token is not known here: it was revoked or never made", "token")
    if now_s >= key.expires_s:
        raise UnauthenticatedError("this node token has expired: ask the operator for a new one", "token")
    if (key.identity.name, key.region) != (node, region):
        raise ForbiddenError(
            f"node {node!r} in region {region!r} given; this node token is for {key.identity.name!r} in {key.region!r}"
        )
    require_member(state, key.identity)
    return key


def redeemed(state: Identities, token_id: str, secret_hash: str, key: str, now_s: float) -> tuple[Identities, Ticket]:
    """The state after a token was used by a key, and the token. Who was shut out before it was made is let in again.

    Raises:
        UnauthenticatedError: unknown, revoked, expired, or used by another key; who guesses is not told which.
    """
    ticket = state.tickets.get(token_id)
    if ticket is None or ticket.used_by == _REVOKED or not hmac.compare_digest(ticket.hash, secret_hash):
        raise UnauthenticatedError("this join token is not known here: it was used, revoked or never made", "token")
    if now_s >= ticket.expires_s:
        raise UnauthenticatedError("this join token has expired: ask the operator for a new one", "token")
    if ticket.used_by not in ("", key):
        raise UnauthenticatedError("this join token has been used: ask the operator for a new one", "token")
    used = replace(ticket, used_by=key)
    return _readmitted(replace(state, tickets={**state.tickets, token_id: used}), ticket.identity), used


def require_member(state: Identities, identity: Identity) -> None:
    """Refuse who is shut out entirely.

    Raises:
        UnauthenticatedError: it is.
    """
    revocation = state.revoked.get(identity)
    if revocation is not None and not revocation.serials:
        raise UnauthenticatedError(f"{identity.uri} was revoked", "revoked")


def require_room(state: Identities, identity: Identity) -> None:
    """Refuse who has had so many certificates that one more could only be meant to keep the network from its work.

    Raises:
        OverloadedError: it has.
    """
    held = sum(each.serial.bit_length() > _TOKEN_BITS for each in state.issued.get(identity, ()))
    if held >= MAX_CERTIFICATES:
        raise OverloadedError(
            f"{identity.uri} has {held} certificates that have not ended; allowed: {MAX_CERTIFICATES}",
            _ROOM_AGAIN_S,
        )


def with_certificate(state: Identities, identity: Identity, region: str | None, made: Issued) -> Identities:
    """One more certificate; `region` None leaves it as it is."""
    regions = state.regions if region is None else {**state.regions, identity: region}
    return replace(state, issued={**state.issued, identity: (*state.issued.get(identity, ()), made)}, regions=regions)


def with_revoked(
    state: Identities, name: str, role: Role | None, known: Iterable[Identity], revocation: Revocation
) -> tuple[Identities, tuple[Identity, ...]]:
    """The state with a node shut out, its tokens good for nobody any more; and who that is.

    Args:
        state: Before.
        name: Whose.
        role: None for whoever has the name.
        known: Nodes that have been seen, whoever made their certificates.
        revocation: Since when, why, by whom.

    Raises:
        NotFoundError: nobody has the name.
        InvalidArgumentError: the reason is too long.
    """
    if len(revocation.reason) > MAX_REASON:
        raise InvalidArgumentError(f"reason: {len(revocation.reason)} characters given; allowed: up to {MAX_REASON}")
    everybody = {*state.issued, *state.revoked, *known, *(ticket.identity for ticket in state.tickets.values())}
    meant = tuple(sorted((i for i in everybody if i.name == name and role in (None, i.role)), key=lambda i: i.uri))
    if not meant:
        raise NotFoundError(f"no node {name!r} is known; `cortex node list` shows who is")
    fresh = {i: revocation for i in meant if i not in state.revoked or state.revoked[i].serials}
    # Remembered until they end: a file that holds them (`join_tokens`) is read again at the next start.
    tickets = {
        key: replace(ticket, used_by=_REVOKED) if ticket.identity in meant else ticket
        for key, ticket in state.tickets.items()
    }
    node_keys = {token_id: key for token_id, key in state.node_keys.items() if key.identity not in meant}
    return replace(state, revoked={**state.revoked, **fresh}, tickets=tickets, node_keys=node_keys), meant


def pruned(state: Identities, now_s: float) -> Identities:
    """Without what has ended: tokens, certificates, and denials of certificates that nobody could use any more."""
    tickets = {key: ticket for key, ticket in state.tickets.items() if ticket.expires_s > now_s}
    issued = {
        identity: tuple(each for each in made if each.expires_s > now_s) for identity, made in state.issued.items()
    }
    issued = {identity: made for identity, made in issued.items() if made}
    # An expired token is remembered for a while, so that its node is told what is wrong.
    node_keys = {token_id: key for token_id, key in state.node_keys.items() if key.expires_s + _KEPT_S > now_s}
    serials = {each.serial for made in issued.values() for each in made}
    revoked = {
        identity: revocation
        for identity, revocation in state.revoked.items()
        if not revocation.serials or revocation.serials & serials
    }
    regions = {identity: region for identity, region in state.regions.items() if identity in issued}
    fresh = Identities(tickets, issued, regions, revoked, node_keys)
    return state if fresh == state else fresh


def _require_free(state: Identities, identity: Identity) -> None:
    for other in state.issued:
        if other.name == identity.name and other.role is not identity.role:
            raise AlreadyExistsError(f"name {other.name!r} belongs to a node of role {other.role.value}")


def _readmitted(state: Identities, identity: Identity) -> Identities:
    """The state with a node let in again that was shut out entirely; everything it had before stays shut out."""
    revocation = state.revoked.get(identity)
    if revocation is None or revocation.serials:
        return state
    serials = frozenset(each.serial for each in state.issued.get(identity, ()))
    return replace(state, revoked=_let_in(state.revoked, identity, serials))


def _let_in(
    revoked: Mapping[Identity, Revocation], identity: Identity, serials: frozenset[int]
) -> Mapping[Identity, Revocation]:
    """The node is let in; its certificates from before stay shut out."""
    others = {each: revocation for each, revocation in revoked.items() if each != identity}
    return {**others, identity: replace(revoked[identity], serials=serials)} if serials else others
