"""A coordinator and an aggregator in this process, over real mutual TLS, and workers that follow a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from cortex_common.clock import SystemClock
from cortex_common.codec import WeightCompressor
from cortex_common.errors import CortexError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import NodeName, RoundNumber, SeatIndex
from cortex_common.pb.v1 import coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.security.sealing import SealingKey
from cortex_common.tensors import Arena, Manifest, TensorKind, chunk_count
from cortex_common.transfer import pull_model, push_update
from cortex_common.transfer.wire import data_key_from_proto, receipt_to_proto
from services.aggregator.main import run as run_aggregator
from services.aggregator.settings import AggregatorSettings
from services.coordinator.main import run as run_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.discovery.main import run as run_discovery
from services.discovery.settings import DiscoverySettings

TlsOf = Callable[..., TlsFiles]
MANIFEST = Manifest.of([("w", (4, 3), TensorKind.TRAINABLE), ("b", (3,), TensorKind.TRAINABLE)])
LARGE = Manifest.of([("w", (500, 600), TensorKind.TRAINABLE), ("b", (3,), TensorKind.TRAINABLE)])
"""1.2 MB of float32."""


class Site:
    """The three services; each can be stopped and started again on its own state and port."""

    def __init__(self, tls_of: TlsOf, root: Path) -> None:
        self.tls_of = tls_of
        self._root = root
        self._running: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}
        self._ports: dict[str, int] = {}
        self.lease_s = 600.0
        self.coordinator_settings: dict[str, Any] = {}
        self.aggregator_settings: dict[str, Any] = {}
        self.advertise: str | None = None
        """Where others find the aggregator; its own address, if None."""
        self.entrance: str | None = None
        """Where workers find the coordinator; its own address, if None."""

    @property
    def coordinator(self) -> str:
        return f"127.0.0.1:{self._ports['coordinator']}"

    @property
    def discovery(self) -> str:
        return self._at("discovery")

    async def start(self, service: str, region: str = "eu") -> None:
        """Start discovery, coordinator, or aggregator; `aggregator-us` is another aggregator."""
        stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
        role = Role(service.partition("-")[0])
        name = service if "-" in service else f"{service}-1"
        tls = self.tls_of(role, name)
        common = {
            "name": name,
            "state_dir": self._root / service,
            "port": self._ports.get(service, 0),
            "ca": tls.ca,
            "certificate": tls.certificate,
            "key": tls.key,
            "region": region,
        }
        run: Any
        if role is Role.DISCOVERY:
            run, settings = run_discovery, DiscoverySettings(**common, lease_s=self.lease_s)
        elif role is Role.AGGREGATOR:
            where = {"discovery": self._at("discovery"), "advertise": self.advertise} | self.aggregator_settings
            run, settings = run_aggregator, AggregatorSettings(**common, **where)
        else:
            limits = {"lease_s": 1.0, "gather_s": 0.2, "report_s": 0.5} | self.coordinator_settings
            run, settings = run_coordinator, CoordinatorSettings(**common, **limits, discovery=self._at("discovery"))
        task = asyncio.create_task(run(settings, SystemClock(), stop, started))
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        if role is Role.COORDINATOR:
            self.running = started.result()
        self._ports[service] = started.result().port
        self._running[service] = (stop, task)

    async def stop(self, service: str) -> None:
        stop, task = self._running.pop(service)
        stop.set()
        await task

    async def close(self) -> None:
        for service in list(self._running):
            await self.stop(service)

    def _at(self, service: str) -> str:
        return f"127.0.0.1:{self._ports[service]}"

    @asynccontextmanager
    async def jobs(
        self, role: Role = Role.OPERATOR, name: str = ""
    ) -> AsyncIterator[coordinator_pb2_grpc.JobServiceAsyncStub]:
        async with open_channel(self.coordinator, self.tls_of(role, name), Role.COORDINATOR) as channel:
            yield coordinator_pb2_grpc.JobServiceStub(channel)


class ScriptedWorker:
    """Attends, and does each assignment with made-up numbers: an update of all `value`, scores of 7 in 10."""

    def __init__(
        self,
        site: Site,
        name: str,
        value: float,
        region: str = "eu",
        incarnation: str = "one",
        manifest: Manifest = MANIFEST,
    ) -> None:
        self.name = name
        self._manifest = manifest
        self._region = region
        self._site = site
        self._value = value
        self._incarnation = incarnation
        self.sealing = SealingKey("cortex")
        self.keys: dict[str, DataKey] = {}
        """Data keys it was given."""
        self._arena: Arena | None = None
        self._held = ""
        self.pulled: list[tuple[int, str, int]] = []
        self._uncounted_bytes = 0
        """Round, kind of object and bytes of each version fetched."""
        self.done: list[str] = []
        self.refuse: str | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self._held_at: int | None = None

    def hold_at(self, round_number: int) -> None:
        """Do not train that round or a later one until `let_go`: the job stands there for as long as a test needs."""
        self._held_at = round_number

    def let_go(self) -> None:
        """Go on."""
        self._held_at = None
        self.idle.set()

    async def work(self) -> None:
        """Until cancelled. As a real worker does, it drops what is no longer wanted."""
        tls = self._site.tls_of(Role.WORKER, self.name)
        while True:
            entrance = self._site.entrance or self._site.coordinator
            running: dict[str, asyncio.Task[None]] = {}
            try:
                async with open_channel(entrance, tls, Role.COORDINATOR) as channel:
                    stub = coordinator_pb2_grpc.AssignmentServiceStub(channel)
                    request = coordinator_pb2.AttendRequest(
                        worker=self.name,
                        region=self._region,
                        incarnation=self._incarnation,
                        slots=1,
                        sealing_key=self.sealing.public,
                    )
                    async for answer in stub.Attend(request):
                        self._follow(stub, answer, running)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
            finally:
                for task in running.values():
                    task.cancel()

    def _follow(
        self, stub: Any, answer: coordinator_pb2.AttendResponse, running: dict[str, asyncio.Task[None]]
    ) -> None:
        wanted = {assignment.assignment_id: assignment for assignment in answer.assignments}
        for assignment_id in set(running) - set(wanted):
            running.pop(assignment_id).cancel()
        for assignment_id, assignment in wanted.items():
            if assignment_id not in running:
                running[assignment_id] = asyncio.create_task(self._once(stub, assignment))

    async def _once(self, stub: Any, assignment: coordinator_pb2.Assignment) -> None:
        is_training = assignment.WhichOneof("work") == "train"
        if self._held_at is not None and is_training and assignment.round >= self._held_at:
            self.idle.clear()
        await self.idle.wait()
        # What fails because the round has moved on, or a service is away, is asked for again by whoever still wants it.
        with suppress(grpc.aio.AioRpcError, CortexError):
            await self._do(stub, assignment)

    async def _do(self, stub: Any, assignment: coordinator_pb2.Assignment) -> None:
        kind = assignment.WhichOneof("work")
        report = coordinator_pb2.ReportRequest(
            worker=self.name,
            incarnation=self._incarnation,
            assignment_id=assignment.assignment_id,
            job_id=assignment.job_id,
            round=assignment.round,
            seat=assignment.seat,
        )
        if self.refuse is not None and kind == "train":
            report.failed.reason, report.failed.permanent = self.refuse, True
        elif kind in ("train", "initialise"):
            receipt = await self._push(assignment)
            report.trained.receipt.CopyFrom(receipt)
            report.trained.examples = 10
            report.trained.metrics["train_loss"] = self._value
            report.trained.bytes_down, self._uncounted_bytes = self._uncounted_bytes, 0
        elif kind == "evaluate":
            await self._pull(assignment)
            for index in assignment.evaluate.slice:
                report.evaluated.slices.add(slice=index, examples=10, loss_sum=5.0, correct=7)
        else:
            return
        await stub.Report(report)
        self.done.append(assignment.assignment_id)

    def _encryption(self, assignment: coordinator_pb2.Assignment) -> EncryptionManager:
        key = data_key_from_proto(assignment.data_key)
        older = [data_key_from_proto(each) for each in assignment.older_keys]
        opened = [self.sealing.unwrap(assignment.job_id, each) for each in (key, *older)]
        self.keys |= {each.key_id: each for each in opened}
        return EncryptionManager(*opened)

    async def _pull(self, assignment: coordinator_pb2.Assignment) -> None:
        """The version to evaluate, from the aggregator named, into the memory of the last: `pull_model` verifies it."""
        tls = self._site.tls_of(Role.WORKER, self.name)
        encryption = self._encryption(assignment)
        async with open_channel(assignment.aggregator_address, tls, Role.AGGREGATOR, bulk=True) as channel:
            base = assignment.base.sha256
            held = self._held
            pulled = await pull_model(
                lambda: channel, assignment.job_id, base, held, encryption, self._memory, assignment.round
            )
        self._held = base
        self._uncounted_bytes += pulled.bytes_down
        self.pulled.append((assignment.round, str(pulled.header.kind), pulled.bytes_down))

    def _memory(self, manifest: Manifest) -> Arena:
        self._held = ""
        if self._arena is None or self._arena.values.size != manifest.elements:
            self._arena = Arena.zeros(manifest)
        return self._arena

    async def _push(self, assignment: coordinator_pb2.Assignment) -> Any:
        encryption = self._encryption(assignment)
        is_first = assignment.round == 0
        header = ObjectHeader(
            kind=ObjectKind.UPDATE,
            network="cortex",
            job_id=assignment.transfer_job_id,
            round=RoundNumber(assignment.round),
            attempt=assignment.attempt,
            fence=assignment.fence,
            sender=NodeName(self.name),
            seat=SeatIndex(assignment.seat),
            key_id=assignment.data_key.key_id,
            codec="none",
            codec_options="",
            chunk_elements=assignment.chunk_elements,
            elements=self._manifest.elements,
            counters=0,
            chunks=chunk_count(self._manifest.elements, 0, assignment.chunk_elements),
            manifest_sha256=self._manifest.sha256,
            base_sha256=assignment.base.sha256,
            manifest=self._manifest.to_json() if is_first else b"",
            weight=1.0 if is_first else 10.0,
        ).fresh()
        values = np.full(self._manifest.elements, self._value, np.float32)
        tls = self._site.tls_of(Role.WORKER, self.name)
        async with open_channel(assignment.aggregator_address, tls, Role.AGGREGATOR, bulk=True) as channel:
            codec = WeightCompressor.create("none", lz4="off")
            result = await push_update(
                channel, header, lambda part: codec.encode(values[part.start : part.stop]), encryption
            )
        return receipt_to_proto(result.receipt)


@asynccontextmanager
async def site(tls_of: TlsOf, root: Path) -> AsyncIterator[Site]:
    made = Site(tls_of, root)
    try:
        for service in ("discovery", "aggregator", "coordinator"):
            await made.start(service)
        yield made
    finally:
        await made.close()


def hold_at(round_number: int, *workers: ScriptedWorker) -> None:
    """All of them stand before that round."""
    for worker in workers:
        worker.hold_at(round_number)


def let_go(*workers: ScriptedWorker) -> None:
    """All of them go on."""
    for worker in workers:
        worker.let_go()


@asynccontextmanager
async def working(*workers: ScriptedWorker) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for worker in workers:
            task = asyncio.create_task(worker.work())
            stack.callback(task.cancel)
        yield
