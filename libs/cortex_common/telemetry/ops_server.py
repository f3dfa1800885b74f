"""What operators and supervisors ask over HTTP: /metrics, /healthz (alive), /readyz (able to work)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cortex_common.errors import PreconditionError
from cortex_common.telemetry.metrics import REGISTRY, cortex_version

Readiness = Callable[[], tuple[bool, str]]
_STOP_GRACE_S = 1


@dataclass(frozen=True, slots=True)
class RunningOps:
    """The HTTP server, listening."""

    host: str
    port: int


class _Server(uvicorn.Server):
    """Leaves signals to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def ops_server(
    host: str, port: int, readiness: Readiness, registry: CollectorRegistry = REGISTRY
) -> AsyncIterator[RunningOps]:
    """Serve inside the block.

    Args:
        host: To listen at.
        port: 0 takes a free one.
        readiness: Whether the service can do its work now, and why (not), in words. Must not block.
        registry: What /metrics shows.

    Raises:
        PreconditionError: the address cannot be listened at.
    """
    listener = listen(host, port)
    config = uvicorn.Config(
        _application(readiness, registry),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_STOP_GRACE_S,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield RunningOps(host, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket: connections queue up from now on.

    Raises:
        PreconditionError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise PreconditionError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _application(readiness: Readiness, registry: CollectorRegistry) -> Starlette:
    def metrics(request: Request) -> Response:
        # Not async: starlette runs it on a thread, since probing the machine takes a while.
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "alive", "version": cortex_version()})

    async def readyz(_request: Request) -> Response:
        ready, reason = readiness()
        return JSONResponse({"ready": ready, "reason": reason}, status_code=200 if ready else 503)

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])
