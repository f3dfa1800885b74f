"""Why a WebSocket between a node and a gateway was closed: the codes of docs/websocket.md."""

from __future__ import annotations

from enum import IntEnum

from cortex_common.errors import (
    ConflictError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)


class Close(IntEnum):
    """Close codes a gateway uses on purpose. Those of RFC 6455 (1002, 1007, 1009 …) keep their meaning."""

    DONE = 1000
    """After LEAVE."""
    GOING_AWAY = 1001
    """The gateway stops: connect again."""
    INTERNAL = 1011
    """A fault of the gateway."""
    TRY_LATER = 1013
    """A service behind the gateway is away, or there is no room: connect again, later."""
    MALFORMED = 4400
    """A frame that is no message of the protocol, or was not due."""
    UNAUTHENTICATED = 4401
    """Token, proof or admission are not good (any more)."""
    FORBIDDEN = 4403
    """The token is for another node."""
    TOO_SLOW = 4408
    """No JOIN in time; or the node did not take a message, finish one it began, or answer a ping."""
    REPLACED = 4409
    """A newer connection of this node took its place."""
    VERSION = 4426
    """No common version of the protocol."""


_CODES: tuple[tuple[type[CortexError], Close], ...] = (
    (InvalidArgumentError, Close.MALFORMED),
    (UnauthenticatedError, Close.UNAUTHENTICATED),
    (ForbiddenError, Close.FORBIDDEN),
    (PreconditionError, Close.VERSION),
    (ConflictError, Close.REPLACED),
)
_PROTOCOL_ERRORS = frozenset({1002, 1003, 1007, 1009, 1010})


def close_code_of(error: CortexError) -> Close:
    """The code with which a connection is closed because of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Close.TRY_LATER)


def error_of_close(code: int, reason: str) -> CortexError:
    """What the closing of a connection means to the node: an UnavailableError unless trying again would not help."""
    message = f"the gateway closed the connection ({code}{f': {reason}' if reason else ''})"
    if code in _PROTOCOL_ERRORS:
        return InvalidArgumentError(message)
    return next((kind(message) for kind, each in _CODES if each == code), UnavailableError(message))
