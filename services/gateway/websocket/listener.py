"""The WebSocket listener: limits on who may even try."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.protocol import State

from cortex_common.errors import PreconditionError
from cortex_common.network.close_codes import Close
from cortex_common.rpc.server import MAX_MESSAGE_BYTES, join_address
from cortex_common.telemetry.ops_server import listen
from services.gateway.settings import GatewaySettings
from services.gateway.websocket.session import Gate, serve_node
from services.gateway.websocket.socket import CLOSE_S, NodeConnection, NodeSocket

PATHS = ("/", "/ws")
_MAX_QUEUED = 2
_TAKING_ROOM = (State.CONNECTING, State.OPEN)


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

    served: set[ServerConnection] = set()
    # Counted here: the library's own list gets a connection only after the node has been told that it is open.
    admitted: set[ServerConnection] = set()

    async def handle(connection: ServerConnection) -> None:
        served.add(connection)
        try:
            await serve_node(NodeSocket(connection, settings.node_patience_s), gate)
        finally:
            served.discard(connection)

    def check(connection: ServerConnection, request: Request) -> Response | None:
        if request.path.partition("?")[0] not in PATHS:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"nodes connect to {' or '.join(PATHS)}\n")
        if sum(each.state in _TAKING_ROOM for each in admitted) >= settings.max_node_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "no room for another node now\n")
        admitted.add(connection)
        connection.connection_lost_waiter.add_done_callback(lambda _: admitted.discard(connection))
        return None

    server = await serve(
        handle,
        sock=listener,
        ssl=tls,
        process_request=check,
        # Weights do not compress, and what does is small.
        compression=None,
        server_header=None,
        open_timeout=settings.head_s,
        # Sessions ping, and say why they close.
        ping_interval=None,
        close_timeout=CLOSE_S,
        create_connection=NodeConnection,
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
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.http_certificate, settings.http_key)
    except OSError as error:
        files = f"{settings.http_certificate} and {settings.http_key}"
        raise PreconditionError(f"HTTPS certificate {files} cannot be used: {error}") from error
    return context
