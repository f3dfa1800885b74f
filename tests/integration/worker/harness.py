"""A coordinator that does what a test says, beside a real aggregator and real workers, all over mutual TLS."""

# ruff: noqa: N802
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from cortex_common.clock import SystemClock
from cortex_common.codec import WeightCompressor
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import KeyId
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_to_proto
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc, common_pb2, coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.aggregator.main import run as run_aggregator
from services.aggregator.settings import AggregatorSettings
from services.worker.main import RunningWorker
from services.worker.main import run as run_worker
from services.worker.settings import WorkerSettings
from tests.integration.worker.gateways import Nodes, files, node_network
from tests.keys import wrapped

TlsOf = Callable[[Role, str], TlsFiles]
PATIENCE_S = 100


def digits_job(compression: Mapping[str, Any] | None = None, **training: Any) -> JobSpec:
    """A small job on real data."""
    return parse_job(
        {
            "name": "digits",
            "model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10},
            "data": {"train": "digits", "test": "digits-test"},
            "training": {"learning_rate": 0.01, **training},
            "compression": compression or {},
        }
    )


class ScriptedCoordinator(coordinator_pb2_grpc.AssignmentServiceServicer):
    """Sends each worker the list of assignments the test sets, and keeps every report."""

    def __init__(self) -> None:
        self.wanted: dict[str, list[coordinator_pb2.Assignment]] = {}
        self.reports: list[coordinator_pb2.ReportRequest] = []
        self.attended = 0
        self.unwanted: set[str] = set()
        self.failures: list[Exception] = []
        self._changed = asyncio.Condition()

    def attach(self, server: grpc.aio.Server) -> None:
        coordinator_pb2_grpc.add_AssignmentServiceServicer_to_server(self, server)

    async def Attend(self, request: Any, context: Any) -> AsyncIterator[coordinator_pb2.AttendResponse]:
        self.attended += 1
        while True:
            async with self._changed:
                now = self.wanted.setdefault(request.worker, [])
            yield coordinator_pb2.AttendResponse(assignments=[_sent(each, request.sealing_key) for each in now])
            async with self._changed:
                while self.wanted[request.worker] is now:
                    await self._changed.wait()

    async def Report(self, request: Any, context: Any) -> coordinator_pb2.ReportResponse:
        if self.failures and request.WhichOneof("report") != "activity":
            raise self.failures.pop()
        async with self._changed:
            self.reports.append(request)
            self._changed.notify_all()
        return coordinator_pb2.ReportResponse(wanted=request.assignment_id not in self.unwanted)

    async def assign(self, worker: str, *assignments: coordinator_pb2.Assignment) -> None:
        """From now on exactly these are wanted of the worker."""
        async with self._changed:
            self.wanted[worker] = list(assignments)
            self._changed.notify_all()

    async def until(self, condition: Callable[[ScriptedCoordinator], Any]) -> Any:
        """Wait until the condition gives something true; that."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: condition(self))
            return condition(self)

    async def report_on(self, assignment: coordinator_pb2.Assignment, kind: str) -> coordinator_pb2.ReportRequest:
        """The first report of a kind on an assignment; an unexpected failure ends the wait."""

        def find(coordinator: ScriptedCoordinator) -> coordinator_pb2.ReportRequest | None:
            mine = [each for each in coordinator.reports if each.assignment_id == assignment.assignment_id]
            return next((each for each in mine if each.WhichOneof("report") in {kind, "failed"}), None)

        report = await self.until(find)
        assert report.WhichOneof("report") == kind, report
        return report

    def activities(self) -> list[str]:
        return [each.activity.activity for each in self.reports if each.WhichOneof("report") == "activity"]

    def count(self, kind: str) -> int:
        return sum(each.WhichOneof("report") == kind for each in self.reports)


@dataclass
class Network:
    """What a test plays with."""

    coordinator: ScriptedCoordinator
    coordinator_address: str
    aggregator_address: str
    rounds: aggregator_pb2_grpc.RoundServiceAsyncStub
    tls_of: TlsOf
    folder: Path
    stack: AsyncExitStack
    key: Any = field(default_factory=EncryptionManager.new_data_key)
    job_id: str = "job-1"
    main: Any = None
    base: str = ""
    round: int = 0
    nodes: Nodes | None = None
    _serial: int = 0

    async def worker(self, name: str = "w1", coordinator: str = "", **settings: Any) -> RunningWorker:
        """Start a worker; it stops with the network."""
        access = await self.access(name, coordinator or self.coordinator_address)
        return await self.stack.enter_async_context(working(name, self.folder, **access, **settings))

    async def access(self, name: str, coordinator: str) -> dict[str, Any]:
        """The settings with which a worker reaches a coordinator: by a certificate, or by a token through a gateway."""
        if self.nodes is None:
            return {"coordinator": coordinator, "discovery": "127.0.0.1:9", **files(self.tls_of(Role.WORKER, name))}
        url = await self.stack.enter_async_context(self.nodes.gateway(coordinator))
        token = await self.nodes.token(name, region="local")
        return {"gateway_url": url, "node_token": token.encode(), "gateway_proxy": "none"}

    async def open_round(
        self, number: int, workers: list[str], base: str = "", attempt: int = 0, codec: str = "none", download: str = ""
    ) -> None:
        options = WeightCompressor.create(codec, {}).options_json if codec != "none" else ""
        await self.rounds.OpenRound(
            aggregator_pb2.OpenRoundRequest(
                round=aggregator_pb2.RoundSpec(
                    job_id=self.job_id,
                    round=number,
                    attempt=attempt,
                    fence=1,
                    base_sha256=base,
                    seats=[aggregator_pb2.Seat(seat=seat, worker=worker) for seat, worker in enumerate(workers)],
                    codec=codec,
                    codec_options=options,
                    strategy="fedavg",
                    strategy_options="",
                    chunk_elements=DEFAULT_CHUNK_ELEMENTS,
                    data_key=await self.wrapped_key(),
                    download_codec=download,
                )
            )
        )

    def assignment(self, spec: JobSpec, number: int, base: str = "", **work: Any) -> coordinator_pb2.Assignment:
        """A new assignment; `work` is one of initialise, train, evaluate, hold, and what else to set."""
        self._serial += 1
        fields: dict[str, Any] = {"seats": 1, "assignment_id": f"a{self._serial}", "fence": 1} | work
        fields.setdefault("aggregator_address", self.aggregator_address)
        made = coordinator_pb2.Assignment(
            job_id=self.job_id,
            round=number,
            job=spec_to_proto(spec),
            data_key=common_pb2.DataKey(key_id=self.key.key_id, epoch=self.key.epoch, key=self.key.key),
            aggregator="aggregator-1",
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            **fields,
        )
        if base:
            made.base.CopyFrom(common_pb2.ModelVersion(job_id=self.job_id, round=number - 1, sha256=base))
        return made

    async def seal(self, number: int, *reports: coordinator_pb2.ReportRequest, attempt: int = 0) -> str:
        """Fold these contributions; the digest of the new version."""
        answer = await self.rounds.SealRound(
            aggregator_pb2.SealRoundRequest(
                job_id=self.job_id,
                round=number,
                attempt=attempt,
                fence=1,
                contributions=[
                    aggregator_pb2.Contribution(
                        seat=each.seat,
                        worker=each.worker,
                        content_sha256=each.trained.receipt.content_sha256,
                        weight=each.trained.receipt.weight,
                    )
                    for each in reports
                ],
                data_key=await self.wrapped_key(),
            )
        )
        return answer.version.sha256

    async def wrapped_key(self) -> common_pb2.DataKey:
        """The data key, for the aggregator."""
        answer = await self.rounds.GetSealingKey(aggregator_pb2.GetSealingKeyRequest())
        return wrapped(answer.public_key, self.job_id, self.key)

    async def next_round(self, spec: JobSpec, **work: Any) -> coordinator_pb2.Assignment:
        """Open the next round for w1, on the first version of the job, and hand the work out."""
        if not self.base:
            self.base = await self.first_version(digits_job())
        self.round += 1
        compression = spec.compression
        await self.open_round(
            self.round, ["w1"], self.base, codec=compression.codec, download=compression.download.codec
        )
        return await self.hand_out(spec, **work)

    async def hand_out(self, spec: JobSpec, **work: Any) -> coordinator_pb2.Assignment:
        """Make this what is wanted of w1: by default, to train in the round that is open."""
        made = self.assignment(spec, self.round, self.base, **(work or {"train": coordinator_pb2.TrainWork()}))
        await self.coordinator.assign("w1", made)
        return made

    async def first_version(self, spec: JobSpec, worker: str = "w1") -> str:
        """Have a worker initialise the model, and seal it."""
        await self.open_round(0, [worker])
        work = self.assignment(spec, 0, initialise=coordinator_pb2.InitialiseWork())
        await self.coordinator.assign(worker, work)
        return await self.seal(0, await self.coordinator.report_on(work, "trained"))

    async def one_round(self) -> None:
        """Have w1 make the first version, train on it, and its update counted."""
        base = await self.first_version(digits_job())
        await self.open_round(1, ["w1"], base)
        work = self.assignment(digits_job(), 1, base, train=coordinator_pb2.TrainWork())
        await self.coordinator.assign("w1", work)
        trained = await self.coordinator.report_on(work, "trained")
        assert trained.trained.receipt.newly_accepted
        assert await self.seal(1, trained) != base


def _sent(assignment: coordinator_pb2.Assignment, member: bytes) -> coordinator_pb2.Assignment:
    """The assignment with its keys wrapped to the worker."""
    sent = coordinator_pb2.Assignment()
    sent.CopyFrom(assignment)
    for plain, key in zip(_keys(assignment), _keys(sent), strict=True):
        key.CopyFrom(wrapped(member, assignment.job_id, DataKey(KeyId(plain.key_id), plain.epoch, plain.key)))
    return sent


def _keys(assignment: coordinator_pb2.Assignment) -> list[common_pb2.DataKey]:
    return [assignment.data_key, *assignment.older_keys, *assignment.sealed.key]


@asynccontextmanager
async def working(name: str, folder: Path, **settings: Any) -> AsyncIterator[RunningWorker]:
    """A worker in this process, with its trainer child."""
    made = WorkerSettings(name=name, state_dir=folder / name, **{"cache_dir": folder / "cache", **settings})
    stop = asyncio.Event()
    started: asyncio.Future[RunningWorker] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_worker(made, SystemClock(), stop, started))
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield started.result()
    finally:
        stop.set()
        await task


@asynccontextmanager
async def coordinating(coordinator: ScriptedCoordinator, tls_of: TlsOf, port: int = 0) -> AsyncIterator[str]:
    """Serve a scripted coordinator; its address."""
    settings = RpcSettings("127.0.0.1", port, tls_of(Role.COORDINATOR, "coordinator-1"), "cortex", stop_grace_s=0)
    async with serving(settings, [coordinator.attach], ["cortex.v1.AssignmentService"]) as running:
        yield running.address


@asynccontextmanager
async def network_of(tls_of: TlsOf, folder: Path, transport: str = "grpc") -> AsyncIterator[Network]:
    """A scripted coordinator and a real aggregator; workers reach them over this transport."""
    coordinator = ScriptedCoordinator()
    async with AsyncExitStack() as stack:
        aggregator = await stack.enter_async_context(aggregating(tls_of, folder))
        address = await stack.enter_async_context(coordinating(coordinator, tls_of))
        channel = open_channel(aggregator, tls_of(Role.COORDINATOR, "coordinator-1"), Role.AGGREGATOR)
        stack.push_async_callback(channel.close)
        rounds: Any = aggregator_pb2_grpc.RoundServiceStub(channel)
        nodes = await stack.enter_async_context(node_network(tls_of, folder)) if transport == "websocket" else None
        yield Network(coordinator, address, aggregator, rounds, tls_of, folder, stack, nodes=nodes)


@asynccontextmanager
async def aggregating(tls_of: TlsOf, folder: Path) -> AsyncIterator[str]:
    """A real aggregator in this process; its address."""
    tls = tls_of(Role.AGGREGATOR, "aggregator-1")
    settings = AggregatorSettings(
        name="aggregator-1", ca=tls.ca, certificate=tls.certificate, key=tls.key, state_dir=folder / "aggregator"
    )
    stop = asyncio.Event()
    started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_aggregator(settings, SystemClock(), stop, started))
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield started.result().address
    finally:
        stop.set()
        await task
