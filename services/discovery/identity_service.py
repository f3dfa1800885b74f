"""The network's identity authority: lets nodes in, renews their certificates, shuts nodes out, tells everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, PreconditionError, UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.logging import get_logger
from cortex_common.rpc.denial import Denial, DenyList
from cortex_common.security.authority import Authority, Lives
from cortex_common.security.certificates import read_certificate
from cortex_common.security.issuing import key_digest
from cortex_common.security.joining import JoinToken, hash_of
from services.discovery import identities, metrics
from services.discovery.identities import Identities, Issued, Revocation, Ticket
from services.discovery.identity_store import IdentityStore

log = get_logger(__name__)
_Result = TypeVar("_Result")
ADVANCE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Granted:
    """A certificate (leaf first) and the roots to trust, as PEM."""

    certificate: bytes
    roots: bytes


class IdentityAuthority:
    """Everything that changes who belongs to the network; each change is on the disk before it is answered.

    Args:
        network: Whose.
        store: What is known of identities.
        authority: Signs; None where certificates come from elsewhere: then only revocation is done here.
        lives: Of certificates.
        clock: What time it is.
        known: The nodes that have been seen.
        own: Discovery's own certificate and the hosts in it.
    """

    def __init__(
        self,
        network: str,
        store: IdentityStore,
        authority: Authority | None,
        lives: Lives,
        clock: Clock,
        known: Callable[[str], Iterable[Identity]],
        own: tuple[TlsFiles, tuple[str, ...]],
    ) -> None:
        self.denied = DenyList()
        self.address = ""
        self._network = network
        self._store = store
        self._authority = authority
        self._lives = lives
        self._clock = clock
        self._known = known
        self._own = own
        self._state = store.load()
        self._roots = authority.bundle if authority else b""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="identities")
        self._watchers: set[asyncio.Event] = set()
        self._closed = False
        self._publish()

    @property
    def state(self) -> Identities:
        """What is known of identities now."""
        return self._state

    @property
    def roots(self) -> bytes:
        """The roots every node trusts, as PEM; empty where certificates come from elsewhere."""
        return self._roots

    async def create_token(self, role: Role, name: str, region: str, life_s: float) -> tuple[JoinToken, float]:
        """A new join token and the wall time at which it expires.

        Raises:
            InvalidArgumentError, AlreadyExistsError: see `with_ticket`.
            PreconditionError: there is no authority here.
        """
        identity = Identity(self._network, role, NodeName(name))
        token = JoinToken.fresh(identity, region, self.address, self._signer().fingerprint)
        now_s = self._clock.wall_s()
        ticket = Ticket(token.token_id, token.hash, identity, region, now_s + life_s, now_s)
        await self.change(lambda state: (identities.with_ticket(state, ticket, now_s), None))
        log.info("join_permitted", identity=identity.uri, region=region, token_id=token.token_id)
        return token, ticket.expires_s

    async def take_tickets(self, tickets: Iterable[Ticket]) -> None:
        """Tokens made elsewhere for this network; those known already are passed over."""

        def take(state: Identities) -> tuple[Identities, None]:
            for ticket in tickets:
                if ticket.token_id not in state.tickets and ticket.expires_s > self._clock.wall_s():
                    state = identities.with_ticket(state, ticket, self._clock.wall_s())
            return state, None

        await self.change(take)

    async def enroll(self, token_id: str, secret: bytes, csr: bytes, hosts: list[str]) -> Granted:
        """A first certificate, for a join token.

        Raises:
            UnauthenticatedError: the token is not good.
            InvalidArgumentError: request or hosts are not allowed.
            OverloadedError: too many of its certificates are still good.
            PreconditionError: there is no authority here.
        """
        signer, now_s = self._signer(), self._clock.wall_s()
        key = key_digest(csr)

        def enroll(state: Identities) -> tuple[Identities, tuple[Identity, bytes]]:
            state, ticket = identities.redeemed(state, token_id, hash_of(secret), key, now_s)
            identities.require_room(state, ticket.identity)
            chain = signer.sign(csr, ticket.identity, hosts, self._lives.leaf)
            made = _issued(chain, now_s)
            return identities.with_certificate(state, ticket.identity, ticket.region, made), (ticket.identity, chain)

        identity, chain = await self.change(enroll)
        metrics.CERTIFICATES.labels(role=identity.role.value, why="join").inc()
        log.info("node_enrolled", identity=identity.uri)
        return Granted(chain, self._roots)

    async def renew(self, caller: Identity, csr: bytes, hosts: list[str]) -> Granted:
        """The caller's next certificate.

        Raises:
            InvalidArgumentError: request or hosts are not allowed.
            OverloadedError: too many of its certificates are still good.
            PreconditionError: there is no authority here.
        """
        signer, now_s = self._signer(), self._clock.wall_s()
        # Before it takes its turn too: those of the others, and the caller's own revocation, wait for every turn.
        identities.require_room(self._state, caller)

        def renew(state: Identities) -> tuple[Identities, bytes]:
            identities.require_member(state, caller)
            identities.require_room(state, caller)
            chain = signer.sign(csr, caller, hosts, self._lives.leaf)
            return identities.with_certificate(state, caller, None, _issued(chain, now_s)), chain

        chain = await self.change(renew)
        metrics.CERTIFICATES.labels(role=caller.role.value, why="renewal").inc()
        return Granted(chain, self._roots)

    async def revoke(self, name: str, role: Role | None, reason: str, by: Identity) -> tuple[Identity, ...]:
        """Shut a node out; who that is.

        Raises:
            NotFoundError: nobody has the name.
        """
        known = frozenset(self._known(self._network))
        if role is not None:
            # A name with its role is enough: it may be somebody whose certificate was made elsewhere and never came.
            known |= {Identity(self._network, role, NodeName(name))}
        revocation = Revocation(self._clock.wall_s(), reason, by.uri)
        meant = await self.change(lambda state: identities.with_revoked(state, name, role, known, revocation))
        for identity in meant:
            log.warning("node_revoked", identity=identity.uri, reason=reason, by=by.uri)
        return meant

    async def rotate(self, *, root: bool) -> tuple[str, ...]:
        """Make a new issuing authority, or a new root too, at once.

        Raises:
            PreconditionError: no authority, or the root's key is not here.
        """
        return await self._advance("root" if root else "issuing")

    async def advance_forever(self, record: Callable[[str, str, str], None]) -> None:
        """Rotate authorities and renew discovery's own certificate when it is time; forget what has ended.

        Args:
            record: Puts into the audit log what was done, to what, and why.
        """
        reason = ""
        while True:
            try:
                await self.change(lambda state: (state, None))
                if self._authority is not None:
                    for kind in await self._advance(""):
                        record("authority rotated", f"authority={kind}", "the one before is due for replacement")
                reason = ""
            except (CortexError, OSError) as error:
                if str(error) != reason:
                    reason = str(error)
                    log.error("authority_not_rotated", reason=reason)
            await self._clock.sleep(ADVANCE_EVERY_S)

    def renew_own(self, name: str = "") -> None:
        """Discovery's own certificate, at half of its life; with `name`, in place of one that is of no use."""
        signer, (own, hosts) = self._signer(), self._own
        if not name:
            leaf = read_certificate(own.certificate.read_bytes())
            if leaf.seconds_left(self._clock.wall_s()) > leaf.life_s / 2 and own.ca.read_bytes() == self._roots:
                return
            name = leaf.identity.name
        signer.issue_into(own, Identity(self._network, Role.DISCOVERY, NodeName(name)), hosts, self._lives.leaf)
        log.info("certificate_renewed", identity=name)

    async def watch(self, refresh_s: float) -> AsyncIterator[tuple[bytes, tuple[Denial, ...]]]:
        """Roots and denials now, at each change, and at least every `refresh_s`."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self._closed:
                changed.clear()
                yield self._roots, self.denied.denials
                waiting = [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(self._clock.sleep(refresh_s))]
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in waiting:
                        each.cancel()
        finally:
            self._watchers.discard(changed)

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        self._wake()
        self._thread.shutdown(wait=False)

    def _signer(self) -> Authority:
        if self._authority is None:
            raise PreconditionError("certificates come from elsewhere: this discovery has no authority (`authority`)")
        return self._authority

    async def _advance(self, force: str) -> tuple[str, ...]:
        signer = self._signer()

        def advance() -> tuple[str, ...]:
            try:
                return signer.rotate(self._lives, force=force)
            finally:
                # Also while the root's key is away: the authorities that are due are good for the rest of their lives.
                self._roots = signer.bundle
                self.renew_own()

        before = self._roots
        made = await self._run(advance)
        for kind in made:
            metrics.ROTATIONS.labels(kind=kind).inc()
            log.info("authority_rotated", kind=kind)
        if self._roots != before:
            self._wake()
        return made

    async def change(self, step: Callable[[Identities], tuple[Identities, _Result]]) -> _Result:
        """Take one step, and keep where it led before anybody is told."""

        def take() -> _Result:
            fresh, result = step(self._state)
            fresh = identities.pruned(fresh, self._clock.wall_s())
            if fresh is not self._state and fresh != self._state:
                try:
                    self._store.save(fresh)
                except OSError as error:
                    raise UnavailableError(f"identities cannot be kept: {error.strerror or error}") from error
                self._state = fresh
            return result

        result = await self._run(take)
        self._publish()
        return result

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        """One at a time, on a thread of its own: signing and syncing take milliseconds."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _publish(self) -> None:
        denials = [
            Denial(identity, revocation.serials, revocation.reason, revocation.at_s)
            for identity, revocation in self._state.revoked.items()
        ]
        metrics.DENIALS.set(len(denials))
        before = self.denied.denials
        self.denied.replace(denials)
        if self.denied.denials != before:
            self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()


def _issued(chain: bytes, now_s: float) -> Issued:
    leaf = read_certificate(chain)
    return Issued(leaf.serial, now_s, leaf.not_after.timestamp())
