"""How soon a call ends whose other end says nothing any more, with Cortex's keepalive and with gRPC's, which is off.

The server process is halted: its machine keeps the connection, as when a process hangs, or when a gateway on the way
forgot the connection and drops what comes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.certificates import HOST, NETWORK, Certificates
from benchmarks.channel import AS_SET, Variant, dialled, started
from benchmarks.channel_server import PING
from cortex_common.clock import SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import channel_options
from cortex_common.rpc.server import RpcSettings, server_options

SILENCE_KEY = ("variant",)
_KEEPALIVE = (
    "grpc.keepalive_time_ms",
    "grpc.keepalive_timeout_ms",
    "grpc.http2.ping_timeout_ms",
    "grpc.keepalive_permit_without_calls",
    "grpc.http2.max_pings_without_data",
)
VARIANTS = (Variant(AS_SET), Variant("ping_timeout left", _KEEPALIVE[2:3]), Variant("keepalive left", _KEEPALIVE))
_CLOCK = SystemClock()


def measure(limit_s: float) -> list[dict[str, Any]]:
    """Seconds from a call to its end, both at a silent server; one entry a variant, None where it did not end.

    Args:
        limit_s: After which a call is given up.

    Raises:
        BenchmarkError: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        certificates = Certificates(Path(name))
        server, client = certificates.of(Role.AGGREGATOR, "server"), certificates.of(Role.WORKER, "client")
        seconds = asyncio.run(_all_ended(server, client, limit_s))
    return [
        {"variant": variant.name, "limit_s": limit_s, "seconds": each}
        for variant, each in zip(VARIANTS, seconds, strict=True)
    ]


async def _all_ended(server: TlsFiles, client: TlsFiles, limit_s: float) -> list[float | None]:
    ends = server_options(RpcSettings(HOST, 0, server, NETWORK, bulk=True))
    with started([(0, variant.applied_to(ends)) for variant in VARIANTS], server) as (pid, ports):
        channels = [
            dialled(port, client, variant.applied_to(channel_options(Role.AGGREGATOR)))
            for variant, port in zip(VARIANTS, ports, strict=True)
        ]
        try:
            for channel in channels:
                await channel.unary_unary(PING)(b"", wait_for_ready=True)
            os.kill(pid, signal.SIGSTOP)
            return await asyncio.gather(*(_ended(channel, limit_s) for channel in channels))
        finally:
            for channel in channels:
                await channel.close(None)


async def _ended(channel: grpc.aio.Channel, limit_s: float) -> float | None:
    begun_s = _CLOCK.monotonic_s()
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            try:
                await channel.unary_unary(PING)(b"")
            except grpc.aio.AioRpcError:
                return _CLOCK.monotonic_s() - begun_s
    return None


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row a variant."""
    lines = ["### A call whose other end is silent", "", "| options | seconds until it ends |", "|---|---|"]
    return "\n".join([*lines, *(f"| {each['variant']} | {_told(each)} |" for each in entries)])


def _told(entry: Mapping[str, Any]) -> str:
    return f"not within {entry['limit_s']:g}" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
