"""Around every request: a cap on bodies, safe headers, counting."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex_common.clock import Clock
from cortex_common.logging import get_logger
from services.gateway import metrics
from services.gateway.problems import BodyTooLargeError, answer

log = get_logger(__name__)

_UNKNOWN_ROUTE = "unknown"
_DRAIN_S = 2.0
# Times the size allowed.
_DRAINED = 8
_SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}


class BodyCap:
    """Refuses bodies beyond a size: by their declared length, or while they arrive.

    A refused body is read on for a little while before the connection is closed, since closing it at once would take
    the answer away from a client that is still sending.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received, refused = 0, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                refused = True
                raise self._error("more")
            return message

        async def lingering(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if refused and is_last:
                await send({**message, "more_body": True})
                await self._drain(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            refused = True
            await answer(self._error(f"{declared[:20].decode()} bytes"))(scope, receive, lingering)
            return
        await self._app(scope, counted, lingering)

    def _error(self, given: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is too large: {given} given; allowed: up to {self._max_bytes} bytes")

    async def _drain(self, receive: Receive) -> None:
        left = _DRAINED * self._max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while left > 0:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    left -= len(message["body"])


class Observed:
    """Counts and logs requests by route, and adds headers that keep browsers safe."""

    def __init__(self, app: ASGIApp, clock: Clock) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status, sent = self._clock.monotonic_s(), HTTPStatus.INTERNAL_SERVER_ERROR.value, 0

        async def observed(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                metrics.SECONDS.labels(_method(scope), _route(scope)).observe(self._clock.monotonic_s() - started_s)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = _route(scope)
            metrics.REQUESTS.labels(_method(scope), route, str(status)).inc()
            metrics.SENT.labels(route).inc(sent)
            seconds = round(self._clock.monotonic_s() - started_s, 4)
            log.debug("request_served", method=scope["method"], route=route, status=status, seconds=seconds, bytes=sent)


def _route(scope: Scope) -> str:
    """The template of the path, so that labels stay few."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else _UNKNOWN_ROUTE


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} else "OTHER"
