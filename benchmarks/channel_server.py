"""`python -m benchmarks.channel_server`: bulk and small calls over mutual TLS, a port for each set of options."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import typer

from benchmarks.certificates import HOST
from cortex_common.clock import SystemClock
from cortex_common.identity import TlsFiles
from cortex_common.rpc.tls import ReloadingServerCredentials

SERVICE = "bench.Channel"
UP, DOWN, PING = (f"/{SERVICE}/{name}" for name in ("Up", "Down", "Ping"))
FRAME_BYTES = 1 << 20


async def _up(frames: AsyncIterator[bytes], _context: Any) -> bytes:
    received = 0
    async for frame in frames:
        received += len(frame)
    return str(received).encode()


async def _down(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    frame = bytes(FRAME_BYTES)
    for _ in range(int(request)):
        yield frame


async def _ping(_request: bytes, _context: Any) -> bytes:
    return b"pong"


async def _serve(tls: TlsFiles, listening: list[tuple[int, list[tuple[str, Any]]]]) -> None:
    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(_up),
        "Down": grpc.unary_stream_rpc_method_handler(_down),
        "Ping": grpc.unary_unary_rpc_method_handler(_ping),
    }
    ports = []
    servers = []
    for port, options in listening:
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        credentials = ReloadingServerCredentials(tls, SystemClock()).credentials()
        ports.append(server.add_secure_port(f"{HOST}:{port}", credentials))
        await server.start()
        servers.append(server)
    typer.echo(json.dumps(ports))
    await asyncio.gather(*(server.wait_for_termination() for server in servers))


def main(
    ca: Annotated[Path, typer.Argument(help="Authority's certificate.")],
    certificate: Annotated[Path, typer.Argument(help="The server's.")],
    key: Annotated[Path, typer.Argument(help="Its private key.")],
    listening: Annotated[str, typer.Argument(help="JSON: [port or 0, options] for each.")],
) -> None:
    """Print the ports as JSON, then serve until killed."""
    places = [(port, [(name, value) for name, value in options]) for port, options in json.loads(listening)]
    asyncio.run(_serve(TlsFiles(ca, certificate, key), places))


if __name__ == "__main__":
    typer.run(main)
