"""Composition root of the worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cortex_common.clock import Clock, SystemClock
from cortex_common.data import DatasetInfo, available_datasets
from cortex_common.errors import InvalidArgumentError, PreconditionError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from cortex_common.lifecycle import hide_memory, run_service, write_ready_file
from cortex_common.logging import configure_logging, get_logger
from cortex_common.network.bridge import Connected, Disconnected, TenzroBridge
from cortex_common.network.enrolment import enroll_patiently
from cortex_common.network.heartbeat import NodeReport
from cortex_common.network.membership import Membership
from cortex_common.network.messages import Assignments, Hello
from cortex_common.security.sealing import SealingKey
from cortex_common.settings import load_settings
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import cortex_version, publish_build_info
from cortex_common.telemetry.ops_server import Readiness, ops_server
from cortex_common.telemetry.resources import probe_resources
from cortex_common.transfer.pacing import Paces
from services.worker import metrics
from services.worker.connecting import policy_of, transport_of
from services.worker.execution import Surroundings
from services.worker.fork_server import IS_POSSIBLE, ForkServer
from services.worker.gate import Gate
from services.worker.outgoing import Outgoing
from services.worker.own import OwnParts
from services.worker.residuals import sweep_daily
from services.worker.settings import WorkerSettings
from services.worker.slots import StartTrainer
from services.worker.supervisor import Supervisor
from services.worker.trainer_process import TrainerProcess, fork_server

_log = get_logger(__name__)
_GOODBYE_S = 1.5


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker at work."""

    incarnation: str
    metrics_port: int
    supervisor: Supervisor
    bridge: TenzroBridge
    gate: Gate


async def run(
    settings: WorkerSettings,
    clock: Clock,
    stop: asyncio.Event,
    started: asyncio.Future[RunningWorker] | None = None,
    own: OwnParts | None = None,
    on_sealed: Callable[[], None] = lambda: None,
) -> None:
    """Work until `stop` is set, then leave.

    With `gateway_url` and `node_token` in the settings, all of it goes through a gateway, over WebSocket.

    Args:
        settings: Who, where, with what.
        clock: For waiting and measuring.
        stop: Ends it.
        started: Told once it works.
        own: Of a program that brings its own data (see `embedded`); by default trainers are child processes and the
            data is that of the catalogue.
        on_sealed: Called before data that are sealed are opened in this process.

    Raises:
        CortexError: certificate or catalogue file are not usable.
    """
    await _join(settings, clock, stop)
    available_datasets(settings.cache_dir, settings.catalogue)
    publish_build_info("worker")
    publish_node(settings.tls if settings.gateway_url is None else None, settings.state_dir, clock)
    incarnation, started_s = uuid.uuid4().hex, clock.wall_s()
    hello = Hello(settings.name, settings.region, incarnation, settings.slots)
    sealing = own.sealing if own else SealingKey(settings.network)
    membership = _membership(settings, clock)
    transport = transport_of(settings, hello, sealing, clock, membership.denied)
    bridge = TenzroBridge(transport, clock, policy_of(settings))
    paces = Paces.of(settings.bandwidth.up, settings.bandwidth.down, clock)
    outgoing = Outgoing(settings.state_dir / "outgoing.json")
    gate = Gate(settings.site_policy, settings.network, outgoing, clock, own.model if own else None)
    counted = outgoing if settings.site_policy else None
    surroundings = Surroundings(
        settings.network, NodeName(settings.name), bridge, clock, sealing, counted, paces, on_sealed=on_sealed
    )
    forks = fork_server(settings.threads, settings.device)
    start_trainer = own.start_trainer if own else _start_trainer(settings, forks)
    supervisor = Supervisor(settings, surroundings, bridge, start_trainer, gate.refusals)
    _route(bridge, supervisor)

    def node() -> NodeReport:
        datasets = own.datasets if own else _datasets(settings)
        return _node(settings, supervisor, datasets, incarnation, started_s)

    try:
        async with (
            _metrics_of(settings, own, partial(_readiness, bridge, supervisor)) as metrics_port,
            asyncio.TaskGroup() as tasks,
        ):
            work = [
                tasks.create_task(supervisor.run()),
                tasks.create_task(_keep_line(bridge, supervisor, gate)),
                *(
                    tasks.create_task(sweep_daily(settings.state_dir / kept, clock))
                    for kept in ("residuals", "updates")
                ),
                tasks.create_task(membership.keep()),
            ]
            announcing = tasks.create_task(bridge.announce_forever(node, stop))
            if settings.ready_file is not None:
                facts = {"name": settings.name, "service": "worker", "address": "", "metrics_port": metrics_port}
                write_ready_file(settings.ready_file, facts)
            if started is not None:
                started.set_result(RunningWorker(incarnation, metrics_port, supervisor, bridge, gate))
            await stop.wait()
            # Over WebSocket the goodbye goes over the line itself.
            await asyncio.wait((announcing,), timeout=_GOODBYE_S)
            for task in (announcing, *work):
                task.cancel()
    finally:
        await forks.close()
        await bridge.close()


def _readiness(bridge: TenzroBridge, supervisor: Supervisor) -> tuple[bool, str]:
    """Whether the worker can be given work, and what it does or lacks."""
    return (True, supervisor.activity) if bridge.is_open else (False, f"no line to {bridge.what}")


def _start_trainer(settings: WorkerSettings, forks: ForkServer) -> StartTrainer:
    if settings.fork_trainers and IS_POSSIBLE:
        return partial(TrainerProcess.fork, forks)
    return partial(TrainerProcess.start, settings.threads, settings.device)


async def _keep_line(bridge: TenzroBridge, supervisor: Supervisor, gate: Gate) -> None:
    """Keep the line open, for ever. A new one is opened when the site's policy changes: the coordinator asks anew."""
    changed = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gate.watch(changed.set))
        while True:
            line = tasks.create_task(bridge.run())
            await changed.wait()
            changed.clear()
            supervisor.recheck()
            line.cancel()
            await asyncio.wait((line,))


async def _join(settings: WorkerSettings, clock: Clock, stop: asyncio.Event) -> None:
    """Have a certificate; through a gateway, none is needed."""
    if settings.gateway_url is None:
        await enroll_patiently(settings.joining, settings.tls, settings.hosts, clock, stop)
        settings.identity(Role.WORKER)


def _membership(settings: WorkerSettings, clock: Clock) -> Membership:
    """Keeps the certificate; through a gateway, there is none to keep and nobody to follow."""
    discovery = settings.discovery if settings.gateway_url is None else None
    return Membership(settings.tls, discovery, settings.state_dir / "denials.json", clock)


def _route(bridge: TenzroBridge, supervisor: Supervisor) -> None:
    """What comes from the network goes to the supervisor."""
    bridge.on(Connected, lambda _: metrics.ATTENDED.set(1))
    bridge.on(Disconnected, lambda _: metrics.ATTENDED.set(0))
    bridge.on(Assignments, supervisor.take)


def main(config: Path | None) -> int:
    """Run the service; what `cortex serve worker` calls."""
    settings = load_settings(WorkerSettings, config, "worker")
    configure_logging(settings.name, settings.log_level, settings.log_json)
    clock = SystemClock()
    return run_service(lambda stop: run(settings, clock, stop, on_sealed=hide_memory), parent_pid=settings.parent_pid)


@asynccontextmanager
async def _metrics_of(settings: WorkerSettings, own: OwnParts | None, readiness: Readiness) -> AsyncIterator[int]:
    """Serve metrics inside the block, if that is wanted; the port, 0 without."""
    if own is not None and not own.serves_metrics:
        yield 0
        return
    async with AsyncExitStack() as stack:
        try:
            ops = await stack.enter_async_context(ops_server(settings.metrics_host, settings.metrics_port, readiness))
        except PreconditionError:
            if own is None:
                raise
            # Several programs with one file: each but the first takes any port, and tells which.
            ops = await stack.enter_async_context(ops_server(settings.metrics_host, 0, readiness))
        yield ops.port


def _datasets(settings: WorkerSettings) -> tuple[DatasetInfo, ...]:
    """What this node can read now."""
    try:
        return tuple(available_datasets(settings.cache_dir, settings.catalogue))
    except InvalidArgumentError as error:
        # Right at the start, spoilt since: go on without, and say so where people look.
        _log.warning("catalogue_not_readable", reason=error.message)
        return ()


def _node(
    settings: WorkerSettings,
    supervisor: Supervisor,
    datasets: tuple[DatasetInfo, ...],
    incarnation: str,
    started_s: float,
) -> NodeReport:
    return NodeReport(
        name=NodeName(settings.name),
        role=Role.WORKER,
        region=settings.region,
        address="",
        incarnation=incarnation,
        version=cortex_version(),
        resources=probe_resources(settings.state_dir, slots=settings.slots, free_slots=supervisor.free_slots),
        started_s=started_s,
        activity=supervisor.activity,
        datasets=datasets,
    )
