"""How soon a channel works again when its server is back, with the pauses between attempts of Cortex and of gRPC."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.certificates import HOST, NETWORK, Certificates
from benchmarks.channel import AS_SET, Variant, dialled, started
from benchmarks.channel_server import PING
from benchmarks.summary import Summary
from cortex_common.clock import SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import channel_options
from cortex_common.rpc.server import RpcSettings, server_options

RETURN_KEY = ("variant", "away_s")
_PAUSES = tuple(f"grpc.{name}_reconnect_backoff_ms" for name in ("initial", "min", "max"))
VARIANTS = (Variant(AS_SET), Variant("reconnect_backoff left", _PAUSES))
_CLOCK = SystemClock()


def measure(away_s: float, repeat: int) -> list[dict[str, Any]]:
    """Seconds from the moment a server accepts calls again to the first answer; one entry a variant.

    Args:
        away_s: How long there is no server.
        repeat: How often.

    Raises:
        BenchmarkError: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        certificates = Certificates(Path(name))
        server, client = certificates.of(Role.AGGREGATOR, "server"), certificates.of(Role.WORKER, "client")
        found: dict[str, list[float]] = {each.name: [] for each in VARIANTS}
        for _ in range(repeat):
            for variant in VARIANTS:
                found[variant.name].append(asyncio.run(_back(variant, server, client, away_s)))
    return [{"variant": name, "away_s": away_s, "seconds": seconds} for name, seconds in found.items()]


async def _back(variant: Variant, server: TlsFiles, client: TlsFiles, away_s: float) -> float:
    options = server_options(RpcSettings(HOST, 0, server, NETWORK, bulk=True))
    with started([(0, options)], server) as (_, [port]):
        channel = dialled(port, client, variant.applied_to(channel_options(Role.AGGREGATOR)))
        await channel.unary_unary(PING)(b"", wait_for_ready=True)
    async with channel:
        # Asked for as soon as it is gone: the attempts to connect go on all the while.
        answer = asyncio.create_task(_answered(channel))
        await _CLOCK.sleep(away_s)
        with started([(port, options)], server):
            back_s = _CLOCK.monotonic_s()
            await answer
            return _CLOCK.monotonic_s() - back_s


async def _answered(channel: grpc.aio.Channel) -> None:
    """Return with the first answer; a call that the end of the server catches is made again."""
    while True:
        try:
            await channel.unary_unary(PING)(b"", wait_for_ready=True)
        except grpc.aio.AioRpcError:
            continue
        return


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row a variant."""
    lines = [
        "### A channel whose server was away",
        "",
        "| options | away s | seconds to the first answer |",
        "|---|---|---|",
    ]
    rows = (f"| {each['variant']} | {each['away_s']:g} | {Summary.of(each['seconds']).text()} |" for each in entries)
    return "\n".join([*lines, *rows])
