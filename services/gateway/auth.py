"""Who asks, by bearer token, and whether they may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from cortex_common.errors import UnauthenticatedError
from cortex_common.security.tokens import Principal, Scope
from services.gateway.surroundings import surroundings_of

_bearer = HTTPBearer(
    auto_error=False, bearerFormat="ctx_<id>_<secret>", description="A token from `cortex token create`"
)


def needs(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency that gives the principal of the request's token, if it has the scope."""

    async def principal(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Principal:
        if given is None:
            raise UnauthenticatedError("no token; allowed: the header 'Authorization: Bearer ctx_<id>_<secret>'")
        found = surroundings_of(request).tokens.verify(given.credentials)
        found.require(scope)
        return found

    return principal


Reader = Annotated[Principal, Depends(needs(Scope.READ))]
Submitter = Annotated[Principal, Depends(needs(Scope.SUBMIT))]
