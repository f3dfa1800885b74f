"""Errors over HTTP: one status for each class, as problem+json (RFC 9457). The only place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cortex_common.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)
from cortex_common.logging import get_logger

log = get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
_INTERNAL = "internal error"


class BodyTooLargeError(InvalidArgumentError):
    """The request's body is longer than the gateway takes."""


class MediaTypeError(InvalidArgumentError):
    """The request's body is of a kind the gateway does not read."""


class Mistake(BaseModel):
    """One mistake in a request: where it is, and what was given against what is allowed."""

    path: str
    message: str


class Problem(BaseModel):
    """Why a request was not done."""

    type: str = Field(description="Stable name of the kind of problem")
    title: str
    status: int
    detail: str
    errors: list[Mistake] = []


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of errors looks over HTTP."""

    status: int
    name: str
    title: str
    retry_after_s: int | None = None


_MALFORMED = Kind(400, "malformed", "The request cannot be read")
_INVALID = Kind(422, "invalid-argument", "The request has mistakes")
KINDS: Mapping[type[CortexError], Kind] = MappingProxyType(
    {
        InvalidArgumentError: _INVALID,
        BodyTooLargeError: Kind(413, "body-too-large", "The body is too large"),
        MediaTypeError: Kind(415, "media-type", "The body is of an unknown kind"),
        UnauthenticatedError: Kind(401, "unauthenticated", "A valid token is needed"),
        ForbiddenError: Kind(403, "forbidden", "The token does not allow this"),
        NotFoundError: Kind(404, "not-found", "No such thing"),
        AlreadyExistsError: Kind(409, "already-exists", "It exists already"),
        PreconditionError: Kind(409, "precondition", "Not possible in its present state"),
        ConflictError: Kind(409, "conflict", "Outdated view"),
        OverloadedError: Kind(429, "overloaded", "No room now", retry_after_s=5),
        UnavailableError: Kind(503, "unavailable", "A service cannot be reached", retry_after_s=1),
        CorruptError: Kind(500, "corrupt", "Stored bytes are damaged"),
        CortexError: Kind(500, "internal", "Internal error"),
    }
)
_MISTAKE = Violation("training.rounds", "-1 given; allowed: greater than or equal to 1")
_TOLD: Mapping[str, tuple[str, Sequence[Violation]]] = MappingProxyType(
    {
        "malformed": ("the body is not JSON: Expecting value at line 1, column 10", ()),
        "invalid-argument": (f"job: 1 mistake\n  {_MISTAKE}", (_MISTAKE,)),
        "body-too-large": ("the body is too large: 2097152 bytes given; allowed: up to 1048576 bytes", ()),
        "media-type": ("content type 'text/html' given; allowed: application/json, application/yaml", ()),
        "unauthenticated": ("no token; allowed: the header 'Authorization: Bearer ctx_<id>_<secret>'", ()),
        "forbidden": ("token 'bob' has the scopes read; this needs submit", ()),
        "not-found": ("no job 0198f2c4a1b27d3e", ()),
        "already-exists": ("this idempotency key was used for another job", ()),
        "precondition": ("job 0198f2c4a1b27d3e has ended: completed", ()),
        "conflict": ("this coordinator was replaced by another", ()),
        "overloaded": ("100 event streams are open; this gateway allows 100", ()),
        "unavailable": ("coordinator at 10.0.0.2:50051 cannot be reached: connection refused", ()),
        "corrupt": ("the stored bytes of the version are damaged", ()),
        "internal": (_INTERNAL, ()),
    }
)
"""What each kind says, for example."""


def kind_of(error: CortexError) -> Kind:
    """How an error looks over HTTP; as the nearest listed class for a subclass."""
    kind = next(KINDS[listed] for listed in type(error).__mro__ if listed in KINDS)
    if kind is _INVALID and isinstance(error, InvalidArgumentError) and not error.violations:
        return _MALFORMED
    return kind


def problem_of(error: CortexError) -> Problem:
    """The answer that tells of an error."""
    kind = kind_of(error)
    violations = error.violations if isinstance(error, InvalidArgumentError) else ()
    detail = _INTERNAL if kind.name == "internal" else error.message
    return _problem(kind, detail, violations)


def install(app: FastAPI) -> None:
    """Answer every error of `app` as a problem."""
    app.add_exception_handler(CortexError, _on_cortex_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_bug)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of the problems a route may answer with."""
    kinds: dict[int, list[Kind]] = {}
    for kind in (_MALFORMED, *KINDS.values()):
        kinds.setdefault(kind.status, []).append(kind)
    return {status: _described(kinds[status]) for status in statuses}


def _described(kinds: Sequence[Kind]) -> dict[str, Any]:
    """One status in the documentation, with an example of each kind that has it."""
    told = {kind.name: {"value": _problem(kind, *_TOLD[kind.name]).model_dump()} for kind in kinds}
    content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": told}
    described: dict[str, Any] = {
        "description": " / ".join(kind.title for kind in kinds),
        "content": {MEDIA_TYPE: content},
    }
    if any(kind.retry_after_s for kind in kinds):
        retry = {"description": "Seconds to wait before asking again", "schema": {"type": "integer"}}
        described["headers"] = {"Retry-After": retry}
    return described


def answer(error: CortexError, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP response for an error."""
    kind = kind_of(error)
    wait_s = (error.retry_after_s if isinstance(error, OverloadedError) else None) or kind.retry_after_s
    advice = {} if wait_s is None else {"Retry-After": str(wait_s)}
    if kind.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        advice["Connection"] = "close"
    return _response(problem_of(error), {**advice, **(headers or {})})


async def _on_cortex_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, CortexError):
        raise error
    kind = kind_of(error)
    if kind.status >= 500:
        log.warning("request_failed", path=request.url.path, status=kind.status, reason=error.message)
    headers = {"WWW-Authenticate": _challenge(request, kind.status)} if kind.status in (401, 403) else {}
    return answer(error, headers)


def _challenge(request: Request, status: int) -> str:
    if status == HTTPStatus.FORBIDDEN:
        return 'Bearer realm="cortex", error="insufficient_scope"'
    given = "authorization" in request.headers
    return 'Bearer realm="cortex", error="invalid_token"' if given else 'Bearer realm="cortex"'


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Errors of the web framework itself: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    status = HTTPStatus(error.status_code)
    name = status.phrase.lower().replace(" ", "-")
    detail = str(error.detail)
    if status is HTTPStatus.NOT_FOUND:
        detail = f"no such path: {request.url.path}; see /docs"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "see /docs")
        detail = f"{request.method} is not possible on {request.url.path}; allowed: {allowed}"
    return _response(_problem(Kind(status, name, status.phrase), detail), error.headers or {})


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Path, query and header values that do not fit."""
    if not isinstance(error, RequestValidationError):
        raise error
    violations = [
        Violation(".".join(str(part) for part in detail["loc"]), f"{detail.get('input')!r} given; {detail['msg']}")
        for detail in error.errors()
    ]
    return answer(InvalidArgumentError.of("request", violations))


async def _on_bug(request: Request, error: Exception) -> Response:
    """Anything else is our fault: the cause stays in the log."""
    return _response(problem_of(CortexError(_INTERNAL)), {})


def _problem(kind: Kind, detail: str, violations: Sequence[Violation] = ()) -> Problem:
    return Problem(
        type=f"urn:cortex:problem:{kind.name}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        errors=[Mistake(path=violation.path, message=violation.message) for violation in violations],
    )


def _response(problem: Problem, headers: Mapping[str, str]) -> Response:
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)
