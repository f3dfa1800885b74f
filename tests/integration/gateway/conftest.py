"""The gateway as a whole on a real socket, in front of scripted services on real mutual TLS."""

# ruff: noqa: N802
from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from cortex_common.clock import SystemClock
from cortex_common.errors import CortexError, NotFoundError
from cortex_common.identity import Role, TlsFiles
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import EventInfo, JobPhase, JobStatus, ModelSummary, RoundReport, VersionInfo
from cortex_common.job.wire import event_to_proto, spec_from_proto, status_to_proto, version_to_proto
from cortex_common.pb.v1 import (
    common_pb2,
    coordinator_pb2,
    coordinator_pb2_grpc,
    discovery_pb2,
    discovery_pb2_grpc,
)
from cortex_common.rpc.identity import current_identity
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.security.tokens import TokenStore
from services.gateway.main import run
from services.gateway.settings import GatewaySettings

TlsOf = Callable[..., TlsFiles]
MOMENT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
MODEL = bytes(range(256)) * 5000
JOB_ID = "job-1"


def job_status(phase: JobPhase = JobPhase.TRAINING, **changes) -> JobStatus:
    fields = {"job_id": JOB_ID, "name": "digits", "status": phase, "round": 2, "rounds": 5, "submitted_at": MOMENT}
    return JobStatus(**(fields | changes))


def model_version(round_number: int = 2, data: bytes = MODEL) -> VersionInfo:
    return VersionInfo(
        job_id=JOB_ID,
        round=round_number,
        sha256=hashlib.sha256(data).hexdigest(),
        manifest_sha256="m" * 64,
        parameters=10,
        size_bytes=len(data),
        metrics={"test_accuracy": 0.9},
        created_at=MOMENT,
    )


@dataclass
class FakeJobs(coordinator_pb2_grpc.JobServiceServicer):
    """One job; raises `error` where it is set; remembers what it was asked and by whom."""

    error: CortexError | None = None
    status: JobStatus = field(
        default_factory=lambda: job_status(
            metrics={"train_loss": float("nan"), "test_accuracy": 0.842},
            history=(RoundReport(round=1, seconds=2.0, accepted=2, metrics={"test_accuracy": 0.8}, model_sha256="ab"),),
            model=ModelSummary(round=1, sha256="ab", parameters=10),
        )
    )
    watched: list[JobStatus] = field(default_factory=list)
    endless: bool = False
    model: bytes = MODEL
    version: VersionInfo = field(default_factory=model_version)
    break_after: int | None = None
    calls: list[str] = field(default_factory=list)
    principals: list[str] = field(default_factory=list)
    orgs: list[str] = field(default_factory=list)
    submitted: list[tuple[JobSpec, str]] = field(default_factory=list)
    watching: int = 0
    log_length: int | None = None
    """Events so far, of a job whose log grows; None for one that has ended with three."""
    events_after: list[int] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    unwatched: asyncio.Event = field(default_factory=asyncio.Event)

    def _called(self, name: str, request, context) -> None:
        assert current_identity().role is Role.GATEWAY
        self.calls.append(name)
        told = dict(context.invocation_metadata())
        self.principals.append(told["cortex-principal"])
        self.orgs.append(told["cortex-org"])
        if self.error is not None:
            raise self.error
        if getattr(request, "job_id", JOB_ID) != JOB_ID:
            raise NotFoundError(f"no job {request.job_id!r}")

    async def SubmitJob(self, request, context):
        self._called("SubmitJob", request, context)
        self.submitted.append((spec_from_proto(request.job), request.request_id))
        return coordinator_pb2.SubmitJobResponse(job_id=JOB_ID)

    async def GetJob(self, request, context):
        self._called("GetJob", request, context)
        return coordinator_pb2.GetJobResponse(job=status_to_proto(self.status))

    async def ListJobs(self, request, context):
        self._called("ListJobs", request, context)
        jobs = [status_to_proto(self.status)] * min(3, request.limit)
        return coordinator_pb2.ListJobsResponse(jobs=jobs)

    async def CancelJob(self, request, context):
        self._called("CancelJob", request, context)
        self.status = job_status(JobPhase.CANCELLED)
        return coordinator_pb2.CancelJobResponse()

    async def PauseJob(self, request, context):
        self._called("PauseJob", request, context)
        self.status = job_status(JobPhase.PAUSED)
        return coordinator_pb2.PauseJobResponse()

    async def ResumeJob(self, request, context):
        self._called("ResumeJob", request, context)
        self.status = job_status(JobPhase.TRAINING)
        return coordinator_pb2.ResumeJobResponse()

    async def WatchJob(self, request, context):
        self._called("WatchJob", request, context)
        self.watching += 1
        try:
            for status in self.watched:
                yield coordinator_pb2.WatchJobResponse(job=status_to_proto(status))
            if self.endless:
                await asyncio.Event().wait()
        finally:
            self.watching -= 1
            self.unwatched.set()

    async def WatchEvents(self, request, context):
        self._called("WatchEvents", request, context)
        self.events_after.append(request.after)
        sent = request.after
        while True:
            for sequence in range(sent + 1, (3 if self.log_length is None else self.log_length) + 1):
                event = EventInfo(sequence=sequence, at=MOMENT, name="round_closed", round=sequence, message="all in")
                yield coordinator_pb2.WatchEventsResponse(event=event_to_proto(event))
                sent = sequence
            if self.log_length is None:
                break
            self.grown.clear()
            await self.grown.wait()
        if request.follow:
            event = EventInfo(sequence=99, at=MOMENT, name="job_completed", round=5, message="")
            yield coordinator_pb2.WatchEventsResponse(event=event_to_proto(event))

    async def ListVersions(self, request, context):
        self._called("ListVersions", request, context)
        return coordinator_pb2.ListVersionsResponse(versions=[version_to_proto(model_version(n)) for n in (1, 2)])

    async def DownloadModel(self, request, context):
        self._called("DownloadModel", request, context)
        if request.HasField("round") and request.round != self.version.round:
            raise NotFoundError(f"round {request.round}: no such version; kept are rounds 2")
        yield coordinator_pb2.DownloadModelResponse(version=version_to_proto(self.version))
        for index, start in enumerate(range(0, len(self.model), 300_000)):
            if index == self.break_after:
                raise NotFoundError("the version was pruned")
            yield coordinator_pb2.DownloadModelResponse(data=self.model[start : start + 300_000])


@dataclass
class FakeNodes(discovery_pb2_grpc.DiscoveryServiceServicer):
    """The nodes the test says; collects heartbeats."""

    nodes: list[common_pb2.Node] = field(default_factory=list)
    heartbeats: list[common_pb2.Node] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    left: list[str] = field(default_factory=list)

    async def Heartbeat(self, request, context):
        self.heartbeats.append(request.node)
        self.heard.set()
        return discovery_pb2.HeartbeatResponse(lease_s=10.0, heartbeat_s=3.0)

    async def Leave(self, request, context):
        self.left.append(request.name)
        return discovery_pb2.LeaveResponse()

    async def ListNodes(self, request, context):
        return discovery_pb2.ListNodesResponse(nodes=self.nodes)

    async def WatchNodes(self, request, context):
        yield discovery_pb2.WatchNodesResponse(nodes=self.nodes)


class Gateway:
    """A running gateway, its peers, its tokens, and a client with every scope."""

    def __init__(self, tls_of: TlsOf, folder: Path) -> None:
        self.tls_of = tls_of
        self.folder = folder
        self.jobs = FakeJobs()
        self.nodes = FakeNodes()
        self.tokens = TokenStore(folder / "gateway" / "tokens.json")
        self.token = self.tokens.create("alice", ["read", "submit"], timedelta(hours=1))
        self.http: httpx.AsyncClient
        self.url = ""
        self.stop = asyncio.Event()
        self.rpc: dict[str, float] = {}
        """What the peers' servers have otherwise than usual."""
        self._peers: dict[str, AsyncExitStack] = {}

    async def _peer(self, role: Role, attach, name: str) -> str:
        settings = RpcSettings("127.0.0.1", 0, self.tls_of(role), "cortex", stop_grace_s=0.0, **self.rpc)
        self._peers[role.value] = stack = AsyncExitStack()
        return (await stack.enter_async_context(serving(settings, [attach], [f"cortex.v1.{name}"]))).address

    def reset(self) -> None:
        """Fakes and the client as they were at first."""
        vars(self.jobs).update(vars(FakeJobs()))
        self.nodes.nodes = []
        self.http.cookies.clear()

    async def stop_peer(self, role: Role) -> None:
        """End one of the services behind the gateway."""
        await self._peers.pop(role.value).aclose()

    @asynccontextmanager
    async def running(self, **changes) -> AsyncIterator[Gateway]:
        attach_jobs = lambda server: coordinator_pb2_grpc.add_JobServiceServicer_to_server(self.jobs, server)  # noqa: E731
        attach_nodes = lambda server: discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(self.nodes, server)  # noqa: E731
        tls = self.tls_of(Role.GATEWAY)
        fields = {
            "ca": tls.ca,
            "certificate": tls.certificate,
            "key": tls.key,
            "name": "gateway-1",
            "port": 0,
            "websocket_port": 0,
            "state_dir": self.folder / "gateway",
            "coordinator": await self._peer(Role.COORDINATOR, attach_jobs, "JobService"),
            "discovery": await self._peer(Role.DISCOVERY, attach_nodes, "DiscoveryService"),
            "ready_file": self.folder / "ready.json",
        }
        settings = GatewaySettings(**(fields | changes))
        started = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run(settings, SystemClock(), self.stop, started))
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        self.url = started.result().url
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=10.0) as self.http:
                yield self
        finally:
            self.stop.set()
            await task
            for stack in self._peers.values():
                await stack.aclose()

    def bearer(self, *scopes: str, name: str = "bob", life: timedelta | None = None) -> dict[str, str]:
        """Headers with a new token."""
        return {"Authorization": f"Bearer {self.tokens.create(name, scopes, life)}"}


@pytest.fixture
def stopped_gateway(tls_of: TlsOf, tmp_path: Path) -> Gateway:
    """A gateway the test starts itself."""
    return Gateway(tls_of, tmp_path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateway(tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """One gateway for all tests of a file."""
    async with Gateway(tls_of, tmp_path_factory.mktemp("gateway")).running() as running:
        yield running


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    """A running gateway, its fakes as new. Tests that stop something start one of their own."""
    shared_gateway.reset()
    return shared_gateway
