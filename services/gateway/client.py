"""Calls to coordinator and discovery."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from cortex_common.envelope import Envelope
from cortex_common.errors import CorruptError, UnauthenticatedError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import EventInfo, JobStatus, VersionInfo
from cortex_common.job.wire import event_from_proto, spec_to_proto, status_from_proto, version_from_proto
from cortex_common.pb.v1 import coordinator_pb2, coordinator_pb2_grpc, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.errors import calling
from cortex_common.rpc.identity import ORG_KEY, PRINCIPAL_KEY, REACH_ALL, REACH_KEY
from cortex_common.security.tokens import Principal, Scope
from services.gateway.domain import NodeInfo
from services.gateway.wire import node_from_proto

_CALL_S = 15.0
_CHECK_S = 2.0
_Message = TypeVar("_Message")


@dataclass(frozen=True, slots=True)
class Download:
    """A model file on its way: what it is, and its bytes in pieces."""

    version: VersionInfo
    pieces: AsyncGenerator[bytes]


@dataclass(frozen=True, slots=True)
class Channels:
    """Connections to the coordinator: short calls wait neither for people who watch nor for model files."""

    calls: grpc.aio.Channel
    watches: grpc.aio.Channel
    bulk: grpc.aio.Channel


class JobClient:
    """The coordinator's JobService, on behalf of a principal; `what` is the peer's name in errors."""

    def __init__(self, channels: Channels, what: str) -> None:
        self._stub = coordinator_pb2_grpc.JobServiceStub(channels.calls)
        self._watches = coordinator_pb2_grpc.JobServiceStub(channels.watches)
        self._bulk = coordinator_pb2_grpc.JobServiceStub(channels.bulk)
        self._channel = channels.calls
        self._what = what

    async def submit(self, job: JobSpec | Envelope, request_id: str, principal: Principal) -> JobId:
        """Submit a job, signed or not; the same request id again gives the same job."""
        request = coordinator_pb2.SubmitJobRequest(request_id=request_id)
        if isinstance(job, Envelope):
            request.signed_job = job.to_json()
        else:
            request.job.CopyFrom(spec_to_proto(job))
        with _asking(self._what):
            response = await self._stub.SubmitJob(request, timeout=_CALL_S, metadata=_by(principal))
        return JobId(response.job_id)

    async def status(self, job_id: JobId, principal: Principal) -> JobStatus:
        """Where a job stands."""
        request = coordinator_pb2.GetJobRequest(job_id=job_id)
        with _asking(self._what):
            response = await self._stub.GetJob(request, timeout=_CALL_S, metadata=_by(principal))
        return status_from_proto(response.job)

    async def jobs(self, limit: int, principal: Principal) -> tuple[JobStatus, ...]:
        """The newest jobs, without history."""
        request = coordinator_pb2.ListJobsRequest(limit=limit)
        with _asking(self._what):
            response = await self._stub.ListJobs(request, timeout=_CALL_S, metadata=_by(principal))
        return tuple(status_from_proto(job) for job in response.jobs)

    async def cancel(self, job_id: JobId, principal: Principal) -> None:
        """End a job."""
        request = coordinator_pb2.CancelJobRequest(job_id=job_id)
        with _asking(self._what):
            await self._stub.CancelJob(request, timeout=_CALL_S, metadata=_by(principal))

    async def pause(self, job_id: JobId, principal: Principal) -> None:
        """Hold a job after the round in progress."""
        request = coordinator_pb2.PauseJobRequest(job_id=job_id)
        with _asking(self._what):
            await self._stub.PauseJob(request, timeout=_CALL_S, metadata=_by(principal))

    async def resume(self, job_id: JobId, principal: Principal) -> None:
        """Let a paused job go on."""
        request = coordinator_pb2.ResumeJobRequest(job_id=job_id)
        with _asking(self._what):
            await self._stub.ResumeJob(request, timeout=_CALL_S, metadata=_by(principal))

    async def versions(self, job_id: JobId, principal: Principal) -> tuple[VersionInfo, ...]:
        """The model versions of a job that are kept."""
        request = coordinator_pb2.ListVersionsRequest(job_id=job_id)
        with _asking(self._what):
            response = await self._stub.ListVersions(request, timeout=_CALL_S, metadata=_by(principal))
        return tuple(version_from_proto(version) for version in response.versions)

    async def watch(self, job_id: JobId, principal: Principal) -> AsyncGenerator[JobStatus]:
        """The status now and at each change, until the job has ended."""
        request = coordinator_pb2.WatchJobRequest(job_id=job_id)
        call = self._watches.WatchJob(request, metadata=_by(principal))
        async for response in _messages(call, self._what):
            yield status_from_proto(response.job)

    async def events(
        self, job_id: JobId, *, follow: bool, after: int, principal: Principal
    ) -> AsyncGenerator[EventInfo]:
        """The events after a sequence number and, with `follow`, new ones until the job has ended."""
        request = coordinator_pb2.WatchEventsRequest(job_id=job_id, follow=follow, after=after)
        call = self._watches.WatchEvents(request, metadata=_by(principal))
        async for response in _messages(call, self._what):
            yield event_from_proto(response.event)

    async def download(self, job_id: JobId, round_number: int | None, principal: Principal) -> Download:
        """Open a model file; the newest version if no round is named.

        Raises:
            CorruptError: the answer names no version; while reading `pieces`: the bytes are not the version's.
        """
        request = coordinator_pb2.DownloadModelRequest(job_id=job_id, round=round_number)
        messages = _messages(self._bulk.DownloadModel(request, metadata=_by(principal)), self._what)
        first = await anext(messages, None)
        if first is None or not first.HasField("version"):
            await messages.aclose()
            raise CorruptError(f"{self._what} sent no version for the model of job {job_id}")
        version = version_from_proto(first.version)
        return Download(version, _checked_pieces(messages, first.data, version))

    async def check(self) -> None:
        """Return if the coordinator answers and is ready.

        Raises:
            UnavailableError: it does not, or is not.
        """
        await _check(self._channel, self._what)


async def _checked_pieces(
    messages: AsyncGenerator[coordinator_pb2.DownloadModelResponse], head: bytes, version: VersionInfo
) -> AsyncGenerator[bytes]:
    """The bytes of a model file; the last piece only if all of them are the version's."""
    digest, held = hashlib.sha256(head), head
    async with aclosing(messages):
        async for response in messages:
            digest.update(response.data)
            if held:
                yield held
            held = response.data
    if digest.hexdigest() != version.sha256:
        raise CorruptError(f"model of job {version.job_id}, round {version.round}: the bytes are not {version.sha256}")
    yield held


async def _messages(call: grpc.aio.UnaryStreamCall[Any, _Message], what: str) -> AsyncGenerator[_Message]:
    """The messages of a stream, which is cancelled when nobody reads it any more."""
    try:
        with _asking(what):
            async for message in call:
                yield message
    finally:
        call.cancel()


class NodeClient:
    """Discovery's node list."""

    def __init__(self, channel: grpc.aio.Channel, what: str) -> None:
        self._stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        self._channel = channel
        self._what = what

    async def nodes(self) -> tuple[NodeInfo, ...]:
        """Every node known, expired ones included for an hour."""
        with _asking(self._what):
            response = await self._stub.ListNodes(discovery_pb2.ListNodesRequest(), timeout=_CALL_S)
        return tuple(node_from_proto(node) for node in response.nodes)

    async def check(self) -> None:
        """Return if discovery answers and is ready.

        Raises:
            UnavailableError: it does not, or is not.
        """
        await _check(self._channel, self._what)


async def _check(channel: grpc.aio.Channel, what: str) -> None:
    ask = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    with _asking(what):
        response = await ask(health_pb2.HealthCheckRequest(), timeout=_CHECK_S)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnavailableError(f"{what} answers, but is not serving")


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """As `calling`; a peer that refuses the gateway's own certificate is no fault of the person who asks."""
    try:
        with calling(what):
            yield
    except UnauthenticatedError as error:
        raise UnavailableError(f"{what} refuses this gateway: {error.message}") from error


def _by(principal: Principal) -> tuple[tuple[str, str], ...]:
    """For whom the gateway asks, in the words of the coordinator."""
    told = ((PRINCIPAL_KEY, principal.name), (ORG_KEY, principal.org))
    return (*told, (REACH_KEY, REACH_ALL)) if principal.may(Scope.ADMIN) else told
