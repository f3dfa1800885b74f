"""A gRPC server that only speaks mutual TLS, 1.3."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import PreconditionError
from cortex_common.identity import TlsFiles
from cortex_common.rpc.auditing import Auditor
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.interceptor import CALL_LIMITS, CallLimits, GuardingInterceptor
from cortex_common.rpc.passing import PassReader
from cortex_common.rpc.tls import ReloadingServerCredentials
from cortex_common.rpc.tls13 import require_tls13

MAX_MESSAGE_BYTES = 4 * 1024 * 1024 + 64 * 1024
WINDOW_BYTES = 1024 * 1024
"""Of one upload: an aggregator may have it for each worker at a time."""
KEEPALIVE_S = 30.0
KEEPALIVE_TIMEOUT_S = 20.0
"""A line of 1 Mbit/s with a deep queue before it may hold up an answer for more than ten seconds."""


@dataclass(frozen=True, slots=True)
class RpcSettings:
    """Where and how a server listens.

    Attributes:
        port: 0 takes a free one.
        network: Callers of another network are refused.
        bulk: True for the data plane: flow control bounded per stream instead of probed.
        window_bytes: Of flow control, where `bulk`: most that one caller's message stream may have on its way.
        max_message_bytes: The largest message that is taken.
        max_streams: RPCs at a time on one connection; more wait at the client.
        max_requests: RPCs at a time on the whole server; more are refused with RESOURCE_EXHAUSTED.
        limits: Of calls and of each caller.
        keepalive_s: A connection on which nothing has come for so long is asked whether anybody is there.
        keepalive_timeout_s: One that has not answered by then is closed.
        handshake_s: A connection that has not finished its handshake by then is closed.
        connection_life_s: After this time clients are asked to connect again, with the certificate they have by then.
        connection_grace_s: RPCs still open this long after that are cut.
        stop_grace_s: How long open RPCs may go on once the server stops.
        denied: Who is shut out.
        auditor: Keeps the record of privileged calls and refusals.
        is_mutual: False for the port at which nodes enrol, whose callers have no certificate yet.
    """

    host: str
    port: int
    tls: TlsFiles
    network: str
    bulk: bool = False
    window_bytes: int = WINDOW_BYTES
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_metadata_bytes: int = 8 * 1024
    max_streams: int = 128
    max_requests: int = 2000
    limits: CallLimits = CALL_LIMITS
    handshake_s: float = 10.0
    keepalive_s: float = KEEPALIVE_S
    keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S
    min_ping_interval_s: float = 20.0
    connection_idle_s: float = 600.0
    connection_life_s: float = 1800.0
    connection_grace_s: float = 300.0
    stop_grace_s: float = 2.0
    clock: Clock = field(default_factory=SystemClock)
    denied: DenyList = field(default_factory=DenyList)
    auditor: Auditor | None = None
    is_mutual: bool = True


class Running:
    """A server that accepts calls."""

    def __init__(self, host: str, port: int, servicer: health.aio.HealthServicer, services: Sequence[str]) -> None:
        self.host = host
        self.port = port
        self._health = servicer
        self._services = ("", *services)
        self._updates: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """host:port it listens at."""
        return join_address(self.host, self.port)

    def set_serving(self, serving: bool) -> None:
        """Have the health service say so from now on."""
        update = asyncio.get_running_loop().create_task(self.announce(serving))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)

    async def announce(self, serving: bool) -> None:
        """`set_serving`, done when it returns."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service at work behind its server."""

    server: Running

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port

    @property
    def address(self) -> str:
        """host:port it listens at."""
        return self.server.address


@asynccontextmanager
async def serving(
    settings: RpcSettings,
    attach: Sequence[Callable[[grpc.aio.Server], None]],
    services: Sequence[str],
) -> AsyncIterator[Running]:
    """Serve inside the block; drain at its end, health turning NOT_SERVING first.

    Args:
        settings: Where and how.
        attach: Each adds one servicer to the server.
        services: Full names of the services, for health and reflection.

    Raises:
        PreconditionError: the address cannot be listened at, or this process would take TLS 1.2.
        NotFoundError, InvalidArgumentError, UnauthenticatedError: the TLS files are not usable, or have expired.
    """
    require_tls13()
    passes = PassReader(settings.tls)
    guard = GuardingInterceptor(
        settings.network, settings.clock, settings.denied, passes, settings.auditor, settings.limits
    )
    server = grpc.aio.server(
        interceptors=[guard],
        options=server_options(settings),
        maximum_concurrent_rpcs=settings.max_requests,
    )
    for each in attach:
        each(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    port = _bind(server, settings)
    running = Running(settings.host, port, health_servicer, services)
    await running.announce(True)
    await server.start()
    try:
        yield running
    finally:
        await health_servicer.enter_graceful_shutdown()
        await server.stop(settings.stop_grace_s)


def server_options(settings: RpcSettings) -> list[tuple[str, int]]:
    """Knobs of gRPC, which ignores an unknown name silently: test the effect of what you add."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", 2 * settings.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.server_handshake_timeout_ms", _ms(settings.handshake_s)),
        *keepalive_options(settings.keepalive_s, settings.keepalive_timeout_s),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(settings.min_ping_interval_s)),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_idle_ms", _ms(settings.connection_idle_s)),
        ("grpc.max_connection_age_ms", _ms(settings.connection_life_s)),
        ("grpc.max_connection_age_grace_ms", _ms(settings.connection_grace_s)),
        # Nothing compressed is taken: a short message could unpack to a long one. (Bit 0: not compressed.)
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Two processes on one port would share its calls at random.
        ("grpc.so_reuseport", 0),
    ]
    return options + (bulk_options(settings.window_bytes) if settings.bulk else [])


def keepalive_options(after_s: float, timeout_s: float) -> list[tuple[str, int]]:
    """Close a connection whose other end is silent, the same at both ends.

    gRPC acts on the later of two limits on an answer, and the second is 60 s by default.
    """
    return [
        ("grpc.keepalive_time_ms", _ms(after_s)),
        ("grpc.keepalive_timeout_ms", _ms(timeout_s)),
        ("grpc.http2.ping_timeout_ms", _ms(timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def bulk_options(window_bytes: int) -> list[tuple[str, int]]:
    """Flow control for the data plane: no stream has more than a window on its way, whatever a probe would find.

    Measured (benchmarks/README.md): the default window of 64 KiB halves the rate of a far line. The probe, left on, is
    no slower on loopback and faster on a far line, but costs an aggregator with 64 workers 9 % more memory.
    """
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", window_bytes)]


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return f"{host}:{port}"
    return f"[{host}]:{port}" if literal.version == 6 else f"{host}:{port}"


def _bind(server: grpc.aio.Server, settings: RpcSettings) -> int:
    address = join_address(settings.host, settings.port)
    credentials = ReloadingServerCredentials(settings.tls, settings.clock).credentials(is_mutual=settings.is_mutual)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PreconditionError(
            f"cannot listen at {address}: the port is taken, or the address is not this machine's (host, port)"
        ) from error
    return port


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
