"""People who sign in elsewhere: bearer JWTs of an OpenID Connect issuer, checked against its published keys.

Who may do what is decided here, by the settings: claims are mapped to scopes and to an organisation, and the algorithm
is taken from an allow-list, never from the token alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Mapping
from typing import Any

import httpx
import jwt
from jwt.types import Options

from cortex_common.clock import Clock
from cortex_common.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from cortex_common.ids import DEFAULT_ORG
from cortex_common.logging import get_logger
from cortex_common.security.tokens import Principal, is_name
from services.gateway.settings import OidcSettings

log = get_logger(__name__)

ID_PREFIX = "oidc:"
"""Of the ids of principals who signed in elsewhere."""

_MAX_TOKEN = 8 * 1024
_MAX_DOCUMENT_BYTES = 256 * 1024
_MAX_KEYS = 64
_TIMEOUT_S = 5.0
# Keys are asked for again after this time; at most this often for an id nobody knows; and serve so long without issuer.
_FRESH_S, _AGAIN_S, _STALE_S = 600.0, 10.0, 3600.0
# While there are none at all.
_FIRST_AGAIN_S = 1.0
# Time is checked here, by the clock of this service.
_CHECKS: Options = {
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
    "enforce_minimum_key_length": True,
    "require": ["iss", "aud", "exp", "iat", "sub"],
}


class OidcVerifier:
    """Verifies the tokens of one issuer."""

    def __init__(self, settings: OidcSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._keys = _IssuerKeys(settings, clock)

    async def verify(self, token: str) -> Principal:
        """Whose token this is.

        Raises:
            UnauthenticatedError: not a token of this issuer for this service, or not now.
            ForbiddenError: its claims give no scope, or no organisation.
            UnavailableError: the issuer's keys cannot be had.
        """
        algorithm, key_id = self._head(token)
        key = await self._keys.get(key_id, algorithm)
        settings = self._settings
        try:
            claims = jwt.decode(token, key, [algorithm], _CHECKS, issuer=settings.issuer, audience=settings.audience)
        except jwt.PyJWTError as error:
            raise UnauthenticatedError(f"the token is not good: {error}", "token") from None
        self._check_times(claims)
        return self._principal(claims)

    def _head(self, token: str) -> tuple[str, str]:
        if len(token) > _MAX_TOKEN:
            raise UnauthenticatedError(f"the token has {len(token)} characters; allowed: {_MAX_TOKEN}", "token")
        try:
            head = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise UnauthenticatedError(f"the token is no JWT: {error}", "token") from None
        algorithm, key_id = head.get("alg"), head.get("kid")
        if algorithm not in self._settings.algorithms:
            allowed = ", ".join(self._settings.algorithms)
            raise UnauthenticatedError(f"the token is signed by {str(algorithm)[:20]!r}; allowed: {allowed}", "token")
        if not isinstance(key_id, str) or not key_id or "crit" in head:
            raise UnauthenticatedError("the token must name its key (kid) and may make no demands (crit)", "token")
        return str(algorithm), key_id

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now_s, leeway_s = self._clock.wall_s(), self._settings.leeway_s
        times = {name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}
        if any(isinstance(each, bool) or not isinstance(each, int | float) for each in times.values()):
            raise UnauthenticatedError("the token's times (exp, iat, nbf) must be numbers", "token")
        if now_s >= times["exp"] + leeway_s:
            raise UnauthenticatedError("the token has expired", "expired")
        if now_s < max(times["iat"], times.get("nbf", 0)) - leeway_s:
            raise UnauthenticatedError("the token is not valid yet: compare the clocks", "token")
        if times["exp"] - times["iat"] > self._settings.max_life_s:
            raise UnauthenticatedError(
                f"the token lives longer than is allowed here, {self._settings.max_life_s:g} s", "token"
            )

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        settings, subject = self._settings, str(claims["sub"])
        digest = hashlib.sha256(f"{settings.issuer}\n{subject}".encode()).hexdigest()
        name = claims.get(settings.name_claim)
        given = _words(claims.get(settings.scope_claim))
        scopes = frozenset(scope for word in given for scope in settings.scopes.get(word, ()))
        if not scopes:
            allowed = ", ".join(settings.scopes)
            raise ForbiddenError(f"the claim {settings.scope_claim!r} gives no scope here; it may hold: {allowed}")
        org = self._org(claims)
        shown = name if isinstance(name, str) and is_name(name) else f"oidc-{digest[:16]}"
        ends_s = float(claims["exp"]) + settings.leeway_s
        return Principal(f"{ID_PREFIX}{digest[:32]}", shown, scopes, org, ends_s)

    def _org(self, claims: Mapping[str, Any]) -> str:
        claim, known = self._settings.org_claim, self._settings.orgs
        if claim is None:
            return DEFAULT_ORG
        given = claims.get(claim)
        words = given if isinstance(given, list) else [given]
        orgs = {known.get(word) if known else word for word in words if isinstance(word, str)}
        found = {org for org in orgs if org is not None and is_name(org)}
        if len(found) == 1:
            return found.pop()
        allowed = f"; allowed: {', '.join(known)}" if known else ""
        raise ForbiddenError(f"the claim {claim!r} names no organisation of this network, or several{allowed}")


class _IssuerKeys:
    """The issuer's keys by id, fetched when needed and kept for a while."""

    def __init__(self, settings: OidcSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._keys: dict[str, Mapping[str, Any]] = {}
        self._fetched_s = self._tried_s = float("-inf")
        self._fetching = asyncio.Lock()
        self._trust = ssl.create_default_context(cafile=settings.ca and str(settings.ca))

    async def get(self, key_id: str, algorithm: str) -> jwt.PyJWK:
        """A key for an algorithm.

        Raises:
            UnauthenticatedError: the issuer has no such key, or it does not fit the algorithm.
            UnavailableError: the issuer cannot be asked, and what is known is too old.
        """
        if self._is_wanted(key_id):
            async with self._fetching:
                if self._is_wanted(key_id):
                    await self._refresh()
        if self._clock.monotonic_s() - self._fetched_s >= _STALE_S:
            raise UnavailableError(f"the keys of {self._settings.issuer} cannot be had now")
        found = self._keys.get(key_id)
        if found is None:
            raise UnauthenticatedError(f"the issuer has no key {key_id[:80]!r}", "token")
        try:
            return jwt.PyJWK(dict(found), algorithm)
        except jwt.PyJWTError as error:
            raise UnauthenticatedError(f"key {key_id[:80]!r} is not one for {algorithm}: {error}", "token") from None

    def _is_wanted(self, key_id: str) -> bool:
        now_s = self._clock.monotonic_s()
        if now_s - self._tried_s < (_AGAIN_S if self._keys else _FIRST_AGAIN_S):
            return False
        return key_id not in self._keys or now_s - self._fetched_s >= _FRESH_S

    async def _refresh(self) -> None:
        self._tried_s = self._clock.monotonic_s()
        try:
            self._keys = await self._fetched()
            self._fetched_s = self._tried_s
        except (httpx.HTTPError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("oidc_keys_not_fetched", issuer=self._settings.issuer, reason=str(error) or repr(error))

    async def _fetched(self) -> dict[str, Mapping[str, Any]]:
        issuer = self._settings.issuer
        async with httpx.AsyncClient(verify=self._trust, timeout=_TIMEOUT_S) as client:
            described = await _document(client, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if described["issuer"] != issuer:
                raise ValueError(f"the issuer there calls itself {str(described['issuer'])[:200]!r}")
            where = self._settings.checked_url(str(described["jwks_uri"]))
            keys = (await _document(client, where))["keys"]
        return {str(key["kid"]): key for key in keys[:_MAX_KEYS] if key.get("use", "sig") == "sig" and "kid" in key}


async def _document(client: httpx.AsyncClient, url: str) -> Mapping[str, Any]:
    """A JSON object, of bounded size; redirects are not followed."""
    async with client.stream("GET", url, headers={"Accept": "application/json"}) as answer:
        answer.raise_for_status()
        if answer.is_redirect:
            raise ValueError(f"{url} redirects")
        body = b""
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > _MAX_DOCUMENT_BYTES:
                raise ValueError(f"{url} answers with more than {_MAX_DOCUMENT_BYTES} bytes")
    document = httpx.Response(200, content=body).json()
    if not isinstance(document, dict):
        raise TypeError(f"{url} answers with no JSON object")
    return document


def _words(claim: object) -> tuple[str, ...]:
    """A claim that is a list of words, or words with spaces between them."""
    if isinstance(claim, str):
        return tuple(claim.split())
    return tuple(word for word in claim if isinstance(word, str)) if isinstance(claim, list) else ()
