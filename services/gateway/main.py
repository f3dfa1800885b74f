"""Composition root of the gateway."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from cortex_common.buckets import Allowance
from cortex_common.clock import Clock, SystemClock
from cortex_common.identity import Identity, Role
from cortex_common.lifecycle import run_service, sleep_unless, write_ready_file
from cortex_common.logging import configure_logging, get_logger
from cortex_common.network.enrolment import enroll_patiently
from cortex_common.network.heartbeat import NodeReport, heartbeat_forever
from cortex_common.network.membership import Membership
from cortex_common.rpc.auditing import Auditor, auditing
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.security.tokens import TokenStore
from cortex_common.settings import load_settings
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import cortex_version, publish_build_info
from cortex_common.telemetry.ops_server import ops_server
from cortex_common.telemetry.resources import probe_resources
from services.gateway import metrics
from services.gateway.access import Access, Limits
from services.gateway.app import create_app
from services.gateway.client import Channels, JobClient, NodeClient
from services.gateway.oidc import OidcVerifier
from services.gateway.relay import NodePeers
from services.gateway.routes.operations import Readiness, check
from services.gateway.server import RunningHttp, http_server
from services.gateway.settings import GatewaySettings
from services.gateway.surroundings import Streams, Surroundings
from services.gateway.token_log import record_heads
from services.gateway.websocket.board import StatusBoard
from services.gateway.websocket.listener import RunningWebSocket, websocket_server
from services.gateway.websocket.session import Gate
from services.gateway.websocket.transfers import Addresses

log = get_logger(__name__)

_PROBE_EVERY_S = 3.0
# A peer that is away is usually on its way up.
_PROBE_AGAIN_S = 0.3


def main(config: Path | None = None) -> int:
    """Run the gateway until it is told to stop; the exit code."""
    settings = load_settings(GatewaySettings, config, "gateway")
    configure_logging("gateway", settings.log_level, settings.log_json)
    return run_service(lambda stop: run(settings, SystemClock(), stop), parent_pid=settings.parent_pid)


@dataclass(slots=True)
class Peers:
    """What the last probe of coordinator and discovery found."""

    found: Readiness

    def __call__(self) -> tuple[bool, str]:
        """For the operators' endpoint."""
        wrong = [f"{peer}: {answer}" for peer, answer in self.found.checks.items() if answer != "ok"]
        return self.found.status == "ok", "; ".join(wrong)


async def run(
    settings: GatewaySettings, clock: Clock, stop: asyncio.Event, started: asyncio.Future[RunningHttp] | None = None
) -> None:
    """Serve until `stop` is set, then drain."""
    await enroll_patiently(settings.joining, settings.tls, settings.hosts, clock, stop)
    identity = settings.identity(Role.GATEWAY)
    publish_build_info("gateway")
    publish_node(settings.tls, settings.state_dir, clock)
    async with (
        auditing(settings.state_dir / "audit", settings.tls, clock) as auditor,
        _surroundings(settings, clock, stop, auditor) as surroundings,
    ):
        app = create_app(surroundings, settings.max_body_bytes)
        peers = Peers(await check(surroundings))
        membership = Membership(settings.tls, settings.discovery, settings.state_dir / "denials.json", clock)
        async with (
            ops_server(settings.metrics_host, settings.metrics_port, peers) as ops,
            http_server(app, settings) as http,
            _nodes(settings, surroundings, membership.denied) as websocket,
            asyncio.TaskGroup() as tasks,
        ):
            address = settings.advertised(http.port)
            report = _reporter(settings, identity, address, clock)
            tasks.create_task(
                heartbeat_forever(_dial(settings), report, clock, stop, what=f"discovery at {settings.discovery}")
            )
            tasks.create_task(_probe_forever(surroundings, peers))
            keeping = [
                tasks.create_task(membership.keep()),
                tasks.create_task(surroundings.access.keep()),
                tasks.create_task(record_heads(surroundings.tokens, auditor, clock)),
            ]
            log.info("serving", url=http.url, websocket=websocket.url, metrics_port=ops.port)
            if settings.ready_file is not None:
                facts = {"service": "gateway", "name": settings.name, "address": address, "metrics_port": ops.port}
                write_ready_file(settings.ready_file, {**facts, "url": http.url, "websocket": websocket.url})
            if started is not None:
                started.set_result(http)
            await stop.wait()
            for task in keeping:
                task.cancel()


@asynccontextmanager
async def _nodes(
    settings: GatewaySettings, surroundings: Surroundings, denied: DenyList
) -> AsyncIterator[RunningWebSocket]:
    """Let nodes take part over WebSocket."""
    clock = surroundings.clock
    async with NodePeers(settings.coordinator, settings.discovery, settings.tls, clock, denied) as peers:
        addresses = Addresses(settings.state_dir / "addresses.json")
        board = StatusBoard(surroundings.jobs)
        gate = Gate(settings.network, peers, board, denied, clock, settings.node_join_s, addresses)
        keeping = asyncio.create_task(addresses.keep(clock))
        try:
            async with websocket_server(settings, gate) as running:
                yield running
        finally:
            keeping.cancel()
            await asyncio.wait((keeping,))


@asynccontextmanager
async def _surroundings(
    settings: GatewaySettings, clock: Clock, stop: asyncio.Event, auditor: Auditor
) -> AsyncIterator[Surroundings]:
    async with AsyncExitStack() as open_channels:

        async def dial(address: str, role: Role, *, bulk: bool = False) -> grpc.aio.Channel:
            return await open_channels.enter_async_context(open_channel(address, settings.tls, role, bulk=bulk))

        to = settings.coordinator
        channels = Channels(
            calls=await dial(to, Role.COORDINATOR),
            watches=await dial(to, Role.COORDINATOR),
            bulk=await dial(to, Role.COORDINATOR, bulk=True),
        )
        tokens = TokenStore(settings.token_file, clock)
        access = _access(settings, tokens, clock)
        yield Surroundings(
            jobs=JobClient(channels, f"coordinator at {to}"),
            nodes=NodeClient(await dial(settings.discovery, Role.DISCOVERY), f"discovery at {settings.discovery}"),
            tokens=tokens,
            access=access,
            auditor=auditor,
            clock=clock,
            streams=Streams(settings.max_event_streams),
            watch_patience_s=settings.watch_patience_s,
            stopping=stop,
        )
        await access.save_use()


async def _probe_forever(surroundings: Surroundings, peers: Peers) -> None:
    """Keep the operators' endpoint and the metrics true; say when a peer goes or comes back."""
    while True:
        found = await check(surroundings)
        for peer, answer in found.checks.items():
            metrics.PEER_UP.labels(peer).set(answer == "ok")
            if answer != peers.found.checks[peer]:
                log.info("peer_changed", peer=peer, answer=answer)
        peers.found = found
        all_up = all(answer == "ok" for answer in found.checks.values())
        pause_s = _PROBE_EVERY_S if all_up else _PROBE_AGAIN_S
        if await sleep_unless(surroundings.stopping, pause_s, surroundings.clock):
            return


def _access(settings: GatewaySettings, tokens: TokenStore, clock: Clock) -> Access:
    limits = Limits(
        requests=Allowance(settings.requests_per_s, settings.requests_burst),
        failures=Allowance(settings.bad_tokens_per_s, settings.bad_tokens_burst),
    )
    oidc = OidcVerifier(settings.oidc, clock) if settings.oidc is not None else None
    return Access(tokens, oidc, limits, clock)


def _dial(settings: GatewaySettings) -> Callable[[], grpc.aio.Channel]:
    return lambda: open_channel(settings.discovery, settings.tls, Role.DISCOVERY)


def _reporter(settings: GatewaySettings, identity: Identity, address: str, clock: Clock) -> Callable[[], NodeReport]:
    """The gateway as it describes itself."""
    incarnation, started_s = uuid.uuid4().hex, clock.wall_s()

    def report() -> NodeReport:
        return NodeReport(
            name=identity.name,
            role=identity.role,
            region=settings.region,
            address=address,
            incarnation=incarnation,
            version=cortex_version(),
            resources=probe_resources(settings.state_dir),
            started_s=started_s,
            activity=f"serving {settings.scheme}",
        )

    return report
