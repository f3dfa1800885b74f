"""The HTTP listener."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from cortex_common.errors import PreconditionError
from cortex_common.rpc.server import join_address
from cortex_common.telemetry.ops_server import listen
from services.gateway.patience import patient
from services.gateway.settings import GatewaySettings

_STOP_GRACE_S = 3
_MAX_HEAD_BYTES = 32 * 1024
# Browsers and programs of others come here, some of which have no TLS 1.3. Of 1.2, only ciphers whose keys nobody can
# work out later from the certificate's, and whose messages cannot be altered.
_TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class RunningHttp:
    """The listener, accepting requests."""

    address: str
    port: int
    url: str


class _Server(uvicorn.Server):
    """Leaves signals to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def http_server(app: FastAPI, settings: GatewaySettings) -> AsyncIterator[RunningHttp]:
    """Serve `app` inside the block; at its end, requests in progress get 3 s.

    Raises:
        PreconditionError: the address cannot be listened at, or the certificate cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http=patient(settings.patience),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        limit_concurrency=settings.max_connections,
        server_header=False,
        ssl_certfile=settings.http_certificate,
        ssl_keyfile=settings.http_key,
        ssl_ciphers=_TLS12_CIPHERS,
        timeout_graceful_shutdown=_STOP_GRACE_S,
    )
    try:
        config.load()
    except OSError as error:
        files = f"{settings.http_certificate} and {settings.http_key}"
        raise PreconditionError(f"HTTPS certificate {files} cannot be used: {error}") from error
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    listener = listen(settings.host, settings.port)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        port = listener.getsockname()[1]
        address = join_address(settings.host, port)
        yield RunningHttp(address, port, f"{settings.scheme}://{address}")
    finally:
        server.should_exit = True
        await task
        listener.close()
