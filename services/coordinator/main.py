"""Composition root of the coordinator."""

from __future__ import annotations

import asyncio
import fcntl
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cortex_common.clock import Clock, SystemClock
from cortex_common.data.catalogue import known_datasets
from cortex_common.errors import PreconditionError
from cortex_common.identity import Identity, Role
from cortex_common.lifecycle import run_service, write_ready_file
from cortex_common.logging import configure_logging, get_logger
from cortex_common.network.enrolment import enroll_patiently
from cortex_common.network.heartbeat import NodeReport, heartbeat_forever
from cortex_common.network.membership import Membership
from cortex_common.rpc.auditing import Auditor, auditing
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.server import RunningService, serving
from cortex_common.security.keyring import FileKeyring, KeyEncryption
from cortex_common.security.pkcs11_keyring import Pkcs11Keyring
from cortex_common.security.sealing import KeyWrapper
from cortex_common.settings import load_settings
from cortex_common.storage.sql import open_engine, sqlite_url
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import cortex_version, publish_build_info
from cortex_common.telemetry.ops_server import ops_server
from cortex_common.telemetry.resources import probe_resources
from services.coordinator.attendance import Attendance
from services.coordinator.client import AggregatorClient, DiscoveryClient
from services.coordinator.coordinator import JobCoordinator
from services.coordinator.dataset_servicer import DATASET_SERVICE, DatasetServicer
from services.coordinator.datasets import SealedDatasets
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain.seen import Dataset
from services.coordinator.key_servicer import KEY_SERVICE, KeyServicer
from services.coordinator.keys import JobKeys
from services.coordinator.link_keeper import LinkKeeper
from services.coordinator.links import Links
from services.coordinator.network_view import NetworkView
from services.coordinator.observers import Observers
from services.coordinator.rekeying import Rekeying
from services.coordinator.resealing import Resealing
from services.coordinator.servicer import ASSIGNMENT_SERVICE, JOB_SERVICE, AssignmentServicer, JobServicer
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.sql_store import SqlStore
from services.coordinator.store import Store
from services.coordinator.store_thread import StoreThread

log = get_logger(__name__)


def main(config: Path | None = None) -> int:
    """Run the coordinator until it is told to stop; the exit code."""
    settings = load_settings(CoordinatorSettings, config, "coordinator")
    configure_logging("coordinator", settings.log_level, settings.log_json)
    return run_service(lambda stop: run(settings, SystemClock(), stop), parent_pid=settings.parent_pid)


@dataclass(frozen=True, slots=True)
class RunningCoordinator(RunningService):
    """A coordinator at work."""

    coordinator: JobCoordinator
    deployment: ModelDeploymentManager


async def run(
    settings: CoordinatorSettings,
    clock: Clock,
    stop: asyncio.Event,
    started: asyncio.Future[RunningCoordinator] | None = None,
) -> None:
    """Serve until `stop` is set, then drain. Jobs go on where they are at the next start."""
    await enroll_patiently(settings.joining, settings.tls, settings.hosts, clock, stop)
    identity = settings.identity(Role.COORDINATOR)
    publish_build_info("coordinator")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    publish_node(settings.tls, settings.state_dir, clock)
    with _only_writer(settings.state_dir):
        async with (
            auditing(settings.state_dir / "audit", settings.tls, clock) as auditor,
            _store(settings) as store,
            _parts(settings, clock, store, identity, auditor) as parts,
        ):
            await _serve(settings, clock, stop, started, parts, identity, auditor)


class _Parts:
    """What is wired together."""

    def __init__(
        self,
        coordinator: JobCoordinator,
        attendance: Attendance,
        network: NetworkView,
        jobs: JobServicer,
        assignments: AssignmentServicer,
        keys: KeyServicer,
        datasets: DatasetServicer,
        membership: Membership,
        job_keys: JobKeys,
        epoch: int,
        deployment: ModelDeploymentManager,
    ) -> None:
        self.deployment = deployment
        self.job_keys = job_keys
        self.epoch = epoch
        self.coordinator = coordinator
        self.attendance = attendance
        self.network = network
        self.jobs = jobs
        self.assignments = assignments
        self.keys = keys
        self.datasets = datasets
        self.membership = membership


@asynccontextmanager
async def _parts(
    settings: CoordinatorSettings, clock: Clock, store: StoreThread[Store], identity: Identity, auditor: Auditor
) -> AsyncIterator[_Parts]:
    epoch = await store.call(lambda opened: opened.acquire(identity.name, clock.wall_s()))
    wrapper = KeyWrapper(settings.network)
    observers = Observers(settings.state_dir / "tensorboard")
    keyring = await asyncio.to_thread(_keyring, settings, clock)
    keys = JobKeys(settings.network, store, keyring, clock, auditor.did)
    datasets = SealedDatasets(settings.network, store, keys, keyring, clock, epoch)
    keys.others.append(datasets.rewrap)
    woken = asyncio.Event()
    attendance = Attendance(clock, woken.set)
    membership = Membership(settings.tls, settings.discovery, settings.state_dir / "denials.json", clock)
    membership.denied.on_change(woken.set)
    network = NetworkView(
        clock,
        attendance,
        woken.set,
        settings.lease_s,
        membership.denied,
    )
    aggregators = AggregatorClient(settings.tls, wrapper, membership.denied)
    deployment = ModelDeploymentManager(
        store, keys, aggregators, network.address_of, partial(membership.denied.refusal, Role.AGGREGATOR)
    )
    resealing = Resealing(store, keys, aggregators, deployment, clock, epoch)
    known = {name: Dataset(info.input_dim, info.classes) for name, info in known_datasets().items()}
    coordinator = JobCoordinator(
        store=store,
        keys=keys,
        rekeying=Rekeying(keys, clock, settings.rules),
        attendance=attendance,
        network=network,
        links=LinkKeeper(Links(aggregators, clock), keys, deployment, network, epoch),
        deployment=deployment,
        resealing=resealing,
        observers=observers,
        known_datasets=known,
        datasets=datasets,
        clock=clock,
        rules=settings.rules,
        epoch=epoch,
        woken=woken,
    )
    log.info("leading", epoch=epoch)
    # Goes on with what a rotation that was broken off has left.
    await keys.rewrap(epoch)
    await datasets.load()
    try:
        jobs = JobServicer(coordinator, deployment, store, clock)
        assignments = AssignmentServicer(coordinator, attendance, wrapper, clock)
        yield _Parts(
            coordinator,
            attendance,
            network,
            jobs,
            assignments,
            KeyServicer(coordinator, resealing, keys, store, epoch),
            DatasetServicer(coordinator, datasets),
            membership,
            keys,
            epoch,
            deployment,
        )
    finally:
        observers.close()
        await aggregators.close()


async def _serve(
    settings: CoordinatorSettings,
    clock: Clock,
    stop: asyncio.Event,
    started: asyncio.Future[RunningCoordinator] | None,
    parts: _Parts,
    identity: Identity,
    auditor: Auditor,
) -> None:
    attach = [parts.jobs.attach, parts.assignments.attach, parts.keys.attach, parts.datasets.attach]
    services = [JOB_SERVICE, ASSIGNMENT_SERVICE, KEY_SERVICE, DATASET_SERVICE]
    await parts.coordinator.take_up()
    async with (
        ops_server(settings.metrics_host, settings.metrics_port, lambda: (not stop.is_set(), "")) as ops,
        serving(settings.rpc(parts.membership.denied, auditor), attach, services) as server,
        asyncio.TaskGroup() as tasks,
    ):
        address = settings.advertised(server.port)
        discovery = DiscoveryClient(settings.discovery, settings.tls)
        background = [
            tasks.create_task(parts.coordinator.run()),
            tasks.create_task(parts.network.follow(discovery)),
            tasks.create_task(parts.membership.keep()),
            tasks.create_task(parts.job_keys.keep_young(settings.kek_age_s, parts.epoch)),
        ]
        heartbeat = tasks.create_task(
            heartbeat_forever(
                lambda: open_channel(settings.discovery, settings.tls, Role.DISCOVERY),
                _reporter(settings, identity, address, clock),
                clock,
                stop,
                what=f"discovery at {settings.discovery}",
            )
        )
        log.info("serving", address=server.address, metrics_port=ops.port)
        if settings.ready_file is not None:
            facts = {"service": "coordinator", "name": settings.name, "address": address, "metrics_port": ops.port}
            write_ready_file(settings.ready_file, facts)
        if started is not None:
            started.set_result(RunningCoordinator(server, parts.coordinator, parts.deployment))
        await stop.wait()
        await heartbeat
        for task in background:
            task.cancel()


@asynccontextmanager
async def _store(settings: CoordinatorSettings) -> AsyncIterator[StoreThread[Store]]:
    url = settings.database or sqlite_url(settings.state_dir / "coordinator.db")
    opened: Store = await asyncio.to_thread(lambda: SqlStore(open_engine(url, settings.database_password_file)))
    thread = StoreThread(opened)
    try:
        yield thread
    finally:
        thread.close()
        opened.close()


def _keyring(settings: CoordinatorSettings, clock: Clock) -> KeyEncryption:
    """Where the key-encryption keys are."""
    if settings.pkcs11_module is None or settings.pkcs11_token is None or settings.pkcs11_pin_file is None:
        return FileKeyring(settings.keyring or settings.state_dir / "keyring.json", clock)
    return Pkcs11Keyring(settings.pkcs11_module, settings.pkcs11_token, settings.pkcs11_pin_file, clock)


@contextmanager
def _only_writer(state_dir: Path) -> Iterator[None]:
    """Hold the directory's lock.

    Raises:
        PreconditionError: another coordinator runs on it.
    """
    with (state_dir / "coordinator.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreconditionError(f"another coordinator is running on {state_dir}") from None
        yield


def _reporter(
    settings: CoordinatorSettings, identity: Identity, address: str, clock: Clock
) -> Callable[[], NodeReport]:
    """The coordinator as it describes itself."""
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
            activity="coordinating",
        )

    return report
