"""Who asks, by bearer token, and whether they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from cortex_common.errors import ForbiddenError, UnauthenticatedError
from cortex_common.security.audit import Entry
from cortex_common.security.tokens import Principal, Scope
from services.gateway.surroundings import surroundings_of

_bearer = HTTPBearer(
    auto_error=False,
    bearerFormat="ctx_<id>_<secret>",
    description="A token from `cortex token create`, or of the OpenID Connect issuer in the gateway's settings",
)


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A request as the audit log sees it."""

    request: Request
    principal: Principal | None = None

    def entry(self, decision: str, code: str, reason: str = "") -> Entry:
        """The record of it."""
        route = self.request.scope.get("route")
        who = f"{self.principal.org}/{self.principal.name}" if self.principal else ""
        return Entry(
            who=who,
            what=f"{self.request.method} {getattr(route, 'path', '')}",
            decision=decision,
            code=code,
            about=" ".join(f"{name}={value[:100]}" for name, value in self.request.path_params.items())[:300],
            reason=reason[:300],
            peer=f"{peer_of(self.request)}:{self.request.client.port if self.request.client else 0}",
        )


def peer_of(request: Request) -> str:
    """Address a request came from."""
    return request.client.host if request.client else ""


def needs(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency that gives the principal of the request's token, if it has the scope."""

    async def principal(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Principal:
        surroundings, found = surroundings_of(request), None
        try:
            found = await surroundings.access.principal(given.credentials if given else None, peer_of(request))
            found.require(scope)
        except (UnauthenticatedError, ForbiddenError) as error:
            if surroundings.auditor is not None:
                surroundings.auditor.refused(HttpCall(request, found), error)
            raise
        return found

    return principal


Reader = Annotated[Principal, Depends(needs(Scope.READ))]
Submitter = Annotated[Principal, Depends(needs(Scope.SUBMIT))]
