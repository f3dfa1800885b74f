"""Who may ask the gateway, and how often: tokens of either kind, and a bucket for each principal."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass

from cortex_common.buckets import Allowance, Buckets
from cortex_common.clock import Clock
from cortex_common.errors import OverloadedError, UnauthenticatedError, UnavailableError
from cortex_common.logging import get_logger
from cortex_common.security.tokens import PREFIX, Principal, TokenStore
from services.gateway import metrics
from services.gateway.oidc import ID_PREFIX, OidcVerifier

log = get_logger(__name__)

_SAVE_USE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How often a principal may ask, and how often an address may come with a token that is not good."""

    requests: Allowance
    failures: Allowance


class Access:
    """Recognises whoever asks."""

    def __init__(self, tokens: TokenStore, oidc: OidcVerifier | None, limits: Limits, clock: Clock) -> None:
        self._tokens = tokens
        self._oidc = oidc
        self._clock = clock
        self._limits = limits
        self._requests = Buckets(limits.requests)
        self._failures = Buckets(limits.failures)
        self._unsaved = ""

    async def principal(self, token: str | None, peer: str) -> Principal:
        """Whose token this is, counted against what they may ask.

        Args:
            token: As it came in the header; None when there was none.
            peer: Address it came from.

        Raises:
            UnauthenticatedError: no token, or it is not good.
            ForbiddenError: its claims give nothing here.
            OverloadedError: the principal, or the address, asks too often.
            UnavailableError: the token's issuer cannot be asked.
        """
        now_s = self._clock.monotonic_s()
        try:
            found = await self._verified(token)
        except UnauthenticatedError:
            # Others come from this address too, through a proxy: good tokens are not refused for the bad ones.
            if wait_s := self._failures.wait_s(peer, now_s):
                metrics.THROTTLED.labels("address").inc()
                raise OverloadedError("too many bad tokens came from this address", math.ceil(wait_s)) from None
            raise
        if wait_s := self._requests.wait_s(found.token_id, now_s):
            allowed = f"{self._limits.requests.per_s:g} requests a second, {self._limits.requests.burst:g} at once"
            metrics.THROTTLED.labels("principal").inc()
            raise OverloadedError(f"token {found.name!r} asks too often; allowed: {allowed}", math.ceil(wait_s))
        return found

    def require_still(self, principal: Principal) -> None:
        """Refuse who came with a good token that is not good any more: an answer may last longer than it.

        Raises:
            UnauthenticatedError: it was revoked, or has expired.
        """
        if principal.expires_s is not None and principal.expires_s <= self._clock.wall_s():
            raise UnauthenticatedError(f"token {principal.name!r} has expired", "expired")
        if principal.token_id.startswith(ID_PREFIX):
            return
        with suppress(UnavailableError):  # what cannot be read now revokes nobody
            if not self._tokens.has(principal.token_id):
                raise UnauthenticatedError(f"token {principal.name!r} was revoked", "revoked")

    async def keep(self) -> None:
        """Write down when tokens were last used, now and then, for ever."""
        while True:
            await self._clock.sleep(_SAVE_USE_EVERY_S)
            await self.save_use()

    async def save_use(self) -> None:
        """Write down when tokens were last used; nothing else depends on it (a Kubernetes Secret is read-only)."""
        try:
            await asyncio.to_thread(self._tokens.save_use)
            self._unsaved = ""
        except (OSError, UnavailableError) as error:
            if str(error) != self._unsaved:
                self._unsaved = str(error)
                log.warning("token_use_not_saved", reason=self._unsaved)

    async def _verified(self, token: str | None) -> Principal:
        if token is None:
            raise UnauthenticatedError(
                "no token; allowed: the header 'Authorization: Bearer ctx_<id>_<secret>'", "no_token"
            )
        if self._oidc is not None and not token.startswith(PREFIX):
            return await self._oidc.verify(token)
        return self._tokens.verify(token)
