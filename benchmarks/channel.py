"""What each option that Cortex sets on its gRPC connections does, against gRPC's default, and others it could set.

A server process listens once for each set of options, with mutual TLS; a client with the same options at its end sends
and receives frames of a chunk's size. All sets take turns, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.certificates import HOST, NETWORK, Certificates
from benchmarks.channel_server import DOWN, FRAME_BYTES, PING, UP
from benchmarks.network import BenchmarkError, child_environment
from benchmarks.processes import cpu_seconds
from benchmarks.shaping import shaped
from benchmarks.summary import Summary
from cortex_common.clock import SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import channel_options
from cortex_common.rpc.server import RpcSettings, server_options
from cortex_common.rpc.tls import client_credentials, current_material

Options = list[tuple[str, Any]]
CHANNEL_KEY = ("variant", "mbit_per_s", "round_trip_s")
_MIB = 1 << 20
_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Variant:
    """A set of options: those of Cortex, but for some left to gRPC's defaults and some changed, at both ends."""

    name: str
    left: tuple[str, ...] = ()
    changed: tuple[tuple[str, int], ...] = ()
    connections: int = 1

    def applied_to(self, options: Sequence[tuple[str, Any]]) -> Options:
        """The options of one end."""
        gone = {*self.left, *(name for name, _ in self.changed)}
        return [*(each for each in options if each[0] not in gone), *self.changed]


AS_SET = "as set"
_PROBE, _WINDOW, _POOL = "grpc.http2.bdp_probe", "grpc.http2.lookahead_bytes", "grpc.use_local_subchannel_pool"
VARIANTS = (
    Variant(AS_SET),
    Variant("bdp_probe left", (_PROBE,)),
    Variant("lookahead_bytes left", (_WINDOW,)),
    Variant("bdp_probe and lookahead_bytes left", (_PROBE, _WINDOW)),
    Variant("lookahead_bytes 256 KiB", changed=((_WINDOW, _MIB // 4),)),
    Variant("lookahead_bytes 4 MiB", changed=((_WINDOW, 4 * _MIB),)),
    Variant("lookahead_bytes 16 MiB", changed=((_WINDOW, 16 * _MIB),)),
    Variant("use_local_subchannel_pool left", (_POOL,)),
    Variant("max_frame_size 1 MiB", changed=(("grpc.http2.max_frame_size", _MIB),)),
    Variant("write_buffer_size 1 MiB", changed=(("grpc.http2.write_buffer_size", _MIB),)),
    Variant("tcp_read_chunk_size 256 KiB", changed=(("grpc.experimental.tcp_read_chunk_size", _MIB // 4),)),
    Variant("two connections", connections=2),
    Variant("four connections", connections=4),
)


@dataclass(frozen=True, slots=True)
class Transfers:
    """MB a second, and CPU-seconds of both ends for a GB, up and down; milliseconds of small calls beside."""

    up: float
    down: float
    up_cpu: float
    down_cpu: float
    beside_ms: float


@dataclass(frozen=True, slots=True)
class Server:
    """The process at the other end, and its port for each variant."""

    pid: int
    ports: Mapping[str, int]
    tls: TlsFiles


def variants(words: Sequence[str]) -> list[Variant]:
    """As set, and those whose names hold one of the words."""
    return [each for each in VARIANTS if each.name == AS_SET or any(word in each.name for word in words)]


def measure(chosen: Sequence[Variant], megabytes: int, repeat: int) -> list[dict[str, Any]]:
    """Variants on loopback, turn by turn; one entry a variant.

    Args:
        chosen: Which.
        megabytes: To send in each transfer.
        repeat: Transfers that count, after one that does not.

    Raises:
        BenchmarkError: the server does not start.
    """
    with _serving(chosen) as server:
        runs = [
            {each.name: asyncio.run(_transfers(server, each, megabytes)) for each in chosen} for _ in range(1 + repeat)
        ]
    return [_entry(each, [run[each.name] for run in runs[1:]], None, None) for each in chosen]


def measure_line(
    chosen: Sequence[Variant], mbit_per_s: int, round_trip_s: float, seconds: float
) -> list[dict[str, Any]]:
    """Those that matter there over such a line; each transfer is as long as so many seconds of it."""
    names = (AS_SET, *(option.rpartition(".")[2] for option in (_WINDOW, _PROBE, _POOL)))
    chosen = [each for each in chosen if any(name in each.name for name in names)]
    entries = []
    with _serving(chosen) as server:
        for variant in chosen:
            with shaped(f"{HOST}:{server.ports[variant.name]}", 1, mbit_per_s, round_trip_s) as [line]:
                far = Server(server.pid, {variant.name: int(line.rpartition(":")[2])}, server.tls)
                run = asyncio.run(_transfers(far, variant, int(mbit_per_s / 8 * seconds)))
            entries.append(_entry(variant, [run], mbit_per_s, round_trip_s))
    return entries


def _entry(
    variant: Variant, runs: Sequence[Transfers], mbit_per_s: int | None, round_trip_s: float | None
) -> dict[str, Any]:
    line = {"mbit_per_s": mbit_per_s, "round_trip_s": round_trip_s}
    return {"variant": variant.name, **line, "runs": [asdict(run) for run in runs]}


async def _transfers(server: Server, variant: Variant, megabytes: int) -> Transfers:
    frames = max(1, megabytes * 1_000_000 // FRAME_BYTES // variant.connections)
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(_channel(server, variant)) for _ in range(variant.connections)]
        other = await stack.enter_async_context(_channel(server, variant))
        up_s, up_cpu, beside_ms = await _timed(server.pid, channels, lambda each: _send(each, frames), other)
        down_s, down_cpu, _ = await _timed(server.pid, channels, lambda each: _receive(each, frames), other)
    gigabytes = frames * variant.connections * FRAME_BYTES / 1e9
    return Transfers(
        1000 * gigabytes / up_s, 1000 * gigabytes / down_s, up_cpu / gigabytes, down_cpu / gigabytes, beside_ms
    )


def dialled(port: int, client: TlsFiles, options: Options) -> grpc.aio.Channel:
    """A channel to a server of `started`, with just these options."""
    credentials = client_credentials(current_material(client, _CLOCK))
    return grpc.aio.secure_channel(f"{HOST}:{port}", credentials, options=options)


@asynccontextmanager
async def _channel(server: Server, variant: Variant) -> Any:
    """Connected, as `cortex_common.rpc.channel` opens one for bulk but for the variant's options."""
    options = variant.applied_to(channel_options(Role.AGGREGATOR, bulk=True))
    async with dialled(server.ports[variant.name], server.tls, options) as channel:
        await channel.unary_unary(PING)(b"", wait_for_ready=True)
        yield channel


async def _timed(
    pid: int, channels: Sequence[grpc.aio.Channel], move: Callable[[Any], Awaitable[None]], other: grpc.aio.Channel
) -> tuple[float, float, float]:
    """Seconds, CPU-seconds of both processes, and the median milliseconds of small calls over another channel."""
    cpu_s, began_s = -cpu_seconds(pid) - cpu_seconds(os.getpid()), _CLOCK.monotonic_s()
    calling = asyncio.create_task(_small_calls(other))
    await asyncio.gather(*(move(each) for each in channels))
    took_s, cpu_s = _CLOCK.monotonic_s() - began_s, cpu_s + cpu_seconds(pid) + cpu_seconds(os.getpid())
    calling.cancel()
    times = await calling
    return took_s, cpu_s, 1000 * Summary.of(times or [took_s]).median


async def _small_calls(channel: grpc.aio.Channel) -> list[float]:
    """One every 20 ms until cancelled; seconds of each."""
    times: list[float] = []
    try:
        while True:
            began_s = _CLOCK.monotonic_s()
            await channel.unary_unary(PING)(b"")
            times.append(_CLOCK.monotonic_s() - began_s)
            await _CLOCK.sleep(0.02)
    except asyncio.CancelledError:
        return times


async def _send(channel: grpc.aio.Channel, frames: int) -> None:
    frame, call = bytes(FRAME_BYTES), channel.stream_unary(UP)()
    for _ in range(frames):
        await call.write(frame)
    await call.done_writing()
    if int(await call) != frames * FRAME_BYTES:
        raise BenchmarkError("not all frames arrived")


async def _receive(channel: grpc.aio.Channel, frames: int) -> None:
    received = 0
    async for frame in channel.unary_stream(DOWN)(str(frames).encode()):
        received += len(frame)
    if received != frames * FRAME_BYTES:
        raise BenchmarkError("not all frames arrived")


@contextmanager
def _serving(variants: Sequence[Variant]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        certificates = Certificates(Path(name))
        tls = certificates.of(Role.AGGREGATOR, "server")
        bulk = server_options(RpcSettings(HOST, 0, tls, NETWORK, bulk=True))
        with started([(0, each.applied_to(bulk)) for each in variants], tls) as (pid, ports):
            names = (each.name for each in variants)
            yield Server(pid, dict(zip(names, ports, strict=True)), certificates.of(Role.WORKER, "client"))


@contextmanager
def started(listening: Sequence[tuple[int, Options]], tls: TlsFiles) -> Iterator[tuple[int, list[int]]]:
    """A server process: its id, and the port it has for each pair of a port (0: any) and options.

    Raises:
        BenchmarkError: it does not start.
    """
    files = map(str, (tls.ca, tls.certificate, tls.key))
    command = [sys.executable, "-m", "benchmarks.channel_server", *files, json.dumps(listening)]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise BenchmarkError("the server at the other end does not start")
        yield process.pid, json.loads(line)
    finally:
        process.kill()
        process.wait()


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row a variant and line, beside the options as they are set on that line."""
    lines = [
        "### Options of gRPC, at both ends",
        "",
        "| line | options | up MB/s | of that as set | CPU-s a GB | down MB/s | of that as set | CPU-s a GB "
        "| a small call meanwhile ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    own = {_line(entry): _medians(entry) for entry in entries if entry["variant"] == AS_SET}
    return "\n".join(lines + [_row(entry, own[_line(entry)]) for entry in entries if _line(entry) in own])


def _row(entry: Mapping[str, Any], own: Transfers) -> str:
    its = _medians(entry)
    cells = (
        _line(entry),
        entry["variant"],
        f"{its.up:.0f}" if its.up > 20 else f"{its.up:.1f}",
        f"{its.up / own.up:.2f}",
        f"{its.up_cpu:.2f}",
        f"{its.down:.0f}" if its.down > 20 else f"{its.down:.1f}",
        f"{its.down / own.down:.2f}",
        f"{its.down_cpu:.2f}",
        f"{its.beside_ms:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _line(entry: Mapping[str, Any]) -> str:
    rate, trip = entry["mbit_per_s"], entry["round_trip_s"]
    return "loopback" if rate is None else f"{rate} Mbit/s, {1000 * trip:.0f} ms"


def _medians(entry: Mapping[str, Any]) -> Transfers:
    runs = entry["runs"]
    return Transfers(**{name: Summary.of([run[name] for run in runs]).median for name in runs[0]})
