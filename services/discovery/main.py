"""Composition root of discovery."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CortexError
from cortex_common.identity import Identity, Role
from cortex_common.lifecycle import run_service, write_ready_file
from cortex_common.logging import configure_logging, get_logger
from cortex_common.network.heartbeat import NodeReport, node_to_proto
from cortex_common.rpc.auditing import Auditor, auditing
from cortex_common.rpc.server import Running, serving
from cortex_common.rpc.tls import current_material
from cortex_common.security.authority import Authority
from cortex_common.settings import load_settings
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import cortex_version, publish_build_info
from cortex_common.telemetry.ops_server import ops_server
from cortex_common.telemetry.resources import probe_resources
from services.discovery.admission import NodeAdmission
from services.discovery.identity_service import ADVANCE_EVERY_S, IdentityAuthority
from services.discovery.identity_store import FileIdentityStore, read_tickets
from services.discovery.service import NodeDiscoveryService
from services.discovery.servicer import (
    ENROLLMENT_SERVICE,
    FULL_NAME,
    IDENTITY_SERVICE,
    DiscoveryServicer,
    EnrollmentServicer,
    IdentityServicer,
)
from services.discovery.settings import DiscoverySettings
from services.discovery.store import FileSnapshotStore, SnapshotStore
from services.discovery.wire import announcement_from_proto

log = get_logger(__name__)


def main(config: Path | None = None) -> int:
    """Run discovery until it is told to stop; the exit code."""
    settings = load_settings(DiscoverySettings, config, "discovery")
    configure_logging("discovery", settings.log_level, settings.log_json)
    return run_service(lambda stop: run(settings, SystemClock(), stop), parent_pid=settings.parent_pid)


async def run(
    settings: DiscoverySettings, clock: Clock, stop: asyncio.Event, started: asyncio.Future[Running] | None = None
) -> None:
    """Serve until `stop` is set, then drain and remember who was here."""
    service = NodeDiscoveryService.restore(settings.rules, clock, await asyncio.to_thread(_store, settings))
    identities = await _identities(settings, service, clock)
    identity = settings.identity(Role.DISCOVERY)
    publish_build_info("discovery")
    publish_node(settings.tls, settings.state_dir, clock)
    admission = NodeAdmission(settings.network, identities, settings.tls, settings.pass_life_s, clock)
    attach = [DiscoveryServicer(service).attach, IdentityServicer(identities, admission).attach]
    async with (
        ops_server(settings.metrics_host, settings.metrics_port, lambda: (not stop.is_set(), "")) as ops,
        auditing(settings.state_dir / "audit", settings.tls, clock) as auditor,
        serving(settings.rpc(identities.denied, auditor), attach, [FULL_NAME, IDENTITY_SERVICE]) as server,
        _enrolling(settings, identities, auditor),
        asyncio.TaskGroup() as tasks,
    ):
        address = settings.advertised(server.port)
        report = _reporter(settings, identity, address, clock)
        background = [
            tasks.create_task(_announce_forever(service, identity, report, clock)),
            tasks.create_task(service.sweep_forever(settings.sweep_every_s)),
            tasks.create_task(service.save_forever(settings.snapshot_every_s)),
            tasks.create_task(identities.advance_forever(auditor.did)),
            tasks.create_task(_follow_tickets(settings, identities, clock)),
        ]
        log.info("serving", address=server.address, enrolment=identities.address, metrics_port=ops.port)
        if settings.ready_file is not None:
            facts = {"service": "discovery", "name": settings.name, "address": address, "metrics_port": ops.port}
            write_ready_file(settings.ready_file, {**facts, "enrolment": identities.address})
        if started is not None:
            started.set_result(server)
        await stop.wait()
        service.close()
        identities.close()
        for task in background:
            task.cancel()
    await service.save()


def _store(settings: DiscoverySettings) -> SnapshotStore:
    if settings.database is None:
        return FileSnapshotStore(settings.state_dir / "nodes.json")
    # Only who wants a database needs SQLAlchemy.
    from cortex_common.storage.sql import open_engine
    from services.discovery.sql_store import SqlSnapshotStore

    return SqlSnapshotStore(open_engine(settings.database, settings.database_password_file))


async def _identities(settings: DiscoverySettings, service: NodeDiscoveryService, clock: Clock) -> IdentityAuthority:
    """The identity authority, with discovery's own certificate in place."""
    lives = settings.lives
    authority = None
    if settings.authority is not None:
        authority = await asyncio.to_thread(Authority.open, settings.network, settings.authority, lives)
    own = settings.tls, settings.hosts
    store = FileIdentityStore(settings.state_dir / "identities.json")
    identities = IdentityAuthority(settings.network, store, authority, lives, clock, service.identities, own)
    identities.denied.on_change(lambda: service.shut_out(identities.denied.denials))
    service.shut_out(identities.denied.denials)
    if authority is not None:
        try:
            if current_material(settings.tls, clock).ca != authority.bundle:
                identities.renew_own(settings.name)
        except CortexError:
            identities.renew_own(settings.name)
    if settings.join_tokens is not None:
        await identities.take_tickets(read_tickets(settings.join_tokens))
    return identities


async def _follow_tickets(settings: DiscoverySettings, identities: IdentityAuthority, clock: Clock) -> None:
    """Take up join tokens that are written to the file later: a file that cannot be read then changes nothing."""
    if settings.join_tokens is None:
        return
    seen = await asyncio.to_thread(_content, settings.join_tokens)
    while True:
        await clock.sleep(ADVANCE_EVERY_S)
        if (content := await asyncio.to_thread(_content, settings.join_tokens)) == seen:
            continue
        seen = content
        try:
            await identities.take_tickets(read_tickets(settings.join_tokens))
        except CortexError as error:
            log.warning("join_tokens_not_taken", reason=str(error))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@asynccontextmanager
async def _enrolling(
    settings: DiscoverySettings, identities: IdentityAuthority, auditor: Auditor
) -> AsyncIterator[None]:
    """Serve those who have no certificate yet, if there is an authority to give them one."""
    if settings.authority is None:
        yield
        return
    rpc = replace(settings.rpc(identities.denied, auditor), port=settings.enrolment_port, is_mutual=False)
    async with serving(rpc, [EnrollmentServicer(identities).attach], [ENROLLMENT_SERVICE]) as server:
        identities.address = settings.advertised_beside(server.port)
        yield


def _reporter(settings: DiscoverySettings, identity: Identity, address: str, clock: Clock) -> Callable[[], NodeReport]:
    """Discovery as it describes itself."""
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
            activity="serving",
        )

    return report


async def _announce_forever(
    service: NodeDiscoveryService, identity: Identity, report: Callable[[], NodeReport], clock: Clock
) -> None:
    """Keep discovery in its own list, by the same way as everybody; a machine that cannot be looked at ends nothing."""
    told = ""
    while True:
        try:
            node = await asyncio.to_thread(report)
        except OSError as error:
            if str(error) != told:
                told = str(error)
                log.warning("not_announced", reason=told)
        else:
            told = ""
            service.heartbeat(identity, announcement_from_proto(node_to_proto(node)))
        await clock.sleep(service.rules.heartbeat_s)
