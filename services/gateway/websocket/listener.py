"""The WebSocket listener: limits on who may even try."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.protocol import State

from cortex_common.errors import PreconditionError, UnavailableError
from cortex_common.network.close_codes import Close
from cortex_common.rpc.server import MAX_MESSAGE_BYTES, join_address
from cortex_common.telemetry.ops_server import listen
from services.gateway.settings import GatewaySettings
from services.gateway.websocket.doorstep import Doorstep
from services.gateway.websocket.session import Gate, serve_node
from services.gateway.websocket.socket import CLOSE_S, NodeConnection, NodeSocket, waiting_at

PATHS = ("/", "/ws")
_MAX_QUEUED = 2
_NO_ROOM = "no room for another node now"


@dataclass(frozen=True, slots=True)
class RunningWebSocket:
    """The listener, accepting nodes."""

    port: int
    url: str


@contextlib.asynccontextmanager
async def websocket_server(settings: GatewaySettings, gate: Gate) -> AsyncIterator[RunningWebSocket]:
    """Serve nodes inside the block; at its end their connections are closed with 1001, so that they connect again.

    Raises:
        PreconditionError: the address cannot be listened at, or the certificate cannot be used.
    """
    tls = _tls(settings)
    listener = listen(settings.host, settings.websocket_port)

    doorstep = Doorstep(settings.max_joining)
    served: set[ServerConnection] = set()
    inside: set[ServerConnection] = set()

    def is_full() -> bool:
        return sum(each.state is State.OPEN for each in inside) >= settings.max_node_connections

    async def handle(connection: ServerConnection) -> None:
        def let_in() -> None:
            if connection not in inside and is_full():
                raise UnavailableError(_NO_ROOM)
            doorstep.leave(cast(NodeConnection, connection))
            inside.add(connection)

        served.add(connection)
        try:
            await serve_node(NodeSocket(connection, settings.node_patience_s), gate, let_in)
        finally:
            served.discard(connection)
            inside.discard(connection)

    def check(connection: ServerConnection, request: Request) -> Response | None:
        if request.path.partition("?")[0] not in PATHS:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"nodes connect to {' or '.join(PATHS)}\n")
        if is_full():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{_NO_ROOM}\n")
        return None

    server = await serve(
        handle,
        sock=listener,
        ssl=tls,
        ssl_handshake_timeout=settings.head_s if tls else None,
        process_request=check,
        # Weights do not compress, and what does is small.
        compression=None,
        server_header=None,
        open_timeout=settings.head_s,
        # Sessions ping, and say why they close.
        ping_interval=None,
        close_timeout=CLOSE_S,
        create_connection=waiting_at(doorstep),
        max_size=MAX_MESSAGE_BYTES,
        max_queue=_MAX_QUEUED,
    )
    port = listener.getsockname()[1]
    scheme = "wss" if tls else "ws"
    try:
        yield RunningWebSocket(port, f"{scheme}://{join_address(settings.host, port)}")
    finally:
        server.close(code=Close.GOING_AWAY, reason="the gateway stops")
        await _until_closed(server, served)
        listener.close()


async def _until_closed(server: Server, served: set[ServerConnection]) -> None:
    """Wait for the nodes to hang up; for those that take nothing, not even the close, not for ever."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await server.wait_closed()
    except TimeoutError:
        for connection in served:
            connection.transport.abort()
        await server.wait_closed()


def _tls(settings: GatewaySettings) -> ssl.SSLContext | None:
    if settings.http_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Nodes are programs of the network's own: unlike the HTTP port, nothing older comes here.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(settings.http_certificate, settings.http_key)
    except OSError as error:
        files = f"{settings.http_certificate} and {settings.http_key}"
        raise PreconditionError(f"HTTPS certificate {files} cannot be used: {error}") from error
    return context
