"""JobService and AssignmentService on gRPC: convert, ask, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.envelope import Envelope
from cortex_common.errors import ForbiddenError, InvalidArgumentError, PreconditionError
from cortex_common.identity import Role
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.spec import JobSpec
from cortex_common.job.statement import statement_of
from cortex_common.job.status import EventInfo
from cortex_common.job.wire import event_to_proto, spec_from_proto, spec_to_proto, status_to_proto, version_to_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.identity import ORG_KEY, PRINCIPAL_KEY, REACH_ALL, REACH_KEY, current_identity
from cortex_common.rpc.passing import current_pass
from cortex_common.security.sealing import KeyWrapper, check_public_key
from services.coordinator import wire
from services.coordinator.attendance import Attendance
from services.coordinator.coordinator import JobCoordinator
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain import wishes
from services.coordinator.domain.reach import EVERYTHING, Caller, Reach
from services.coordinator.domain.seen import Activity, Seen
from services.coordinator.store import Store, StoredEvent
from services.coordinator.store_thread import StoreThread

JOB_SERVICE = pb.DESCRIPTOR.services_by_name["JobService"].full_name
ASSIGNMENT_SERVICE = pb.DESCRIPTOR.services_by_name["AssignmentService"].full_name
_EVENTS_AT_ONCE = 500
_MAX_REQUEST_ID = 200
_MAX_NAME = 100


class JobServicer(coordinator_pb2_grpc.JobServiceServicer):
    """For people."""

    def __init__(
        self,
        coordinator: JobCoordinator,
        deployment: ModelDeploymentManager,
        store: StoreThread[Store],
        clock: Clock,
    ) -> None:
        self._coordinator = coordinator
        self._deployment = deployment
        self._store = store
        self._clock = clock

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        coordinator_pb2_grpc.add_JobServiceServicer_to_server(self, server)

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Any) -> pb.SubmitJobResponse:
        """Take a job."""
        spec = self._spec_of(request)
        if len(request.request_id) > _MAX_REQUEST_ID:
            raise InvalidArgumentError(
                f"request_id: {len(request.request_id)} characters given; allowed: up to {_MAX_REQUEST_ID}"
            )
        caller, request_id = _caller(context), request.request_id or None
        return pb.SubmitJobResponse(job_id=await self._coordinator.submit(spec, caller, request_id, request.signed_job))

    def _spec_of(self, request: pb.SubmitJobRequest) -> JobSpec:
        """The job that is to be run: as it is given, or as the signed statement says."""
        if not request.signed_job:
            return spec_from_proto(request.job)
        if request.HasField("job"):
            raise InvalidArgumentError("job and signed_job given; allowed: one of them")
        statement = statement_of(Envelope.from_json(request.signed_job, "signed_job"))
        if statement.expires_at.timestamp() <= self._clock.wall_s():
            raise PreconditionError(f"the signed job has expired at {statement.expires_at.isoformat()}; sign it again")
        return spec_from_proto(spec_to_proto(statement.job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        """Where a job stands."""
        status = await self._coordinator.status(JobId(request.job_id), _caller(context).reach)
        return pb.GetJobResponse(job=status_to_proto(status))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """Newest first."""
        statuses = await self._coordinator.newest(min(request.limit or 100, 1000), _caller(context).reach)
        short = [status.model_copy(update={"history": ()}) for status in statuses]
        return pb.ListJobsResponse(jobs=[status_to_proto(status) for status in short])

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        """The status now and at each change."""
        async for status in self._coordinator.watch(JobId(request.job_id), _caller(context).reach):
            yield pb.WatchJobResponse(job=status_to_proto(status))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        """End a job."""
        await self._coordinator.command(JobId(request.job_id), wishes.cancel, _caller(context))
        return pb.CancelJobResponse()

    async def PauseJob(self, request: pb.PauseJobRequest, context: Any) -> pb.PauseJobResponse:
        """Rest after this round."""
        await self._coordinator.command(JobId(request.job_id), wishes.pause, _caller(context))
        return pb.PauseJobResponse()

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:
        """Go on."""
        await self._coordinator.command(JobId(request.job_id), wishes.resume, _caller(context))
        return pb.ResumeJobResponse()

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        """The event log, and what is added to it."""
        job_id, after, reach = JobId(request.job_id), request.after, _caller(context).reach
        while True:
            ended = (await self._coordinator.job(job_id, reach)).stage.is_terminal
            events = await self._store.call(partial(_read_events, job_id=job_id, after=after, reach=reach))
            for event in events:
                after = event.sequence
                yield pb.WatchEventsResponse(event=event_to_proto(_shown(event)))
            if len(events) < _EVENTS_AT_ONCE:
                if ended or not request.follow:
                    return
                await self._coordinator.next_event()

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:
        """What can be downloaded."""
        reach = _caller(context).reach
        job = await self._coordinator.job(JobId(request.job_id), reach)
        versions = await self._deployment.versions(job.id, reach)
        return pb.ListVersionsResponse(versions=[version_to_proto(version) for version in versions])

    async def DownloadModel(
        self, request: pb.DownloadModelRequest, context: Any
    ) -> AsyncIterator[pb.DownloadModelResponse]:
        """A version's file."""
        reach = _caller(context).reach
        job = await self._coordinator.job(JobId(request.job_id), reach)
        wanted = request.round if request.HasField("round") else None
        version, pieces = await self._deployment.download(job, wanted, reach)
        first = True
        async for piece in pieces:
            yield pb.DownloadModelResponse(version=version_to_proto(version) if first else None, data=piece)
            first = False


class AssignmentServicer(coordinator_pb2_grpc.AssignmentServiceServicer):
    """For workers."""

    def __init__(self, coordinator: JobCoordinator, attendance: Attendance, wrapper: KeyWrapper, clock: Clock) -> None:
        self._coordinator = coordinator
        self._attendance = attendance
        self._wrapper = wrapper
        self._clock = clock

    def attach(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        coordinator_pb2_grpc.add_AssignmentServiceServicer_to_server(self, server)

    async def Attend(self, request: pb.AttendRequest, context: Any) -> AsyncIterator[pb.AttendResponse]:
        """A worker's line."""
        worker = _own_name(request.worker)
        if not request.incarnation or request.slots < 1:
            raise InvalidArgumentError("attend: incarnation must be given and slots must be 1 or more")
        check_public_key(request.sealing_key)
        _check_pass(request)
        wrap = partial(self._wrapper.wrap, request.sealing_key)
        async for orders in self._attendance.attend(worker, request.region, request.incarnation, request.slots):
            yield wire.attend_response(orders, wrap)

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        """What a worker did."""
        worker = _own_name(request.worker)
        job_id, round_number, attempt = wire.round_of_assignment(request.assignment_id)
        if self._attendance.is_replaced(worker, request.incarnation):
            return pb.ReportResponse(wanted=False)
        if refusals := wire.refusals_of(request):
            self._coordinator.refuse(worker, job_id, refusals)
            return pb.ReportResponse(wanted=True)
        change, seat = self._change(request, worker), SeatIndex(request.seat)
        wanted = self._coordinator.report(worker, seat, job_id, round_number, attempt, change)
        return pb.ReportResponse(wanted=wanted)

    def _change(self, request: pb.ReportRequest, worker: NodeName) -> Callable[[Seen], Seen]:
        """How an observation about the round changes with this report."""
        seat, kind = SeatIndex(request.seat), request.WhichOneof("report")
        now_s = self._clock.monotonic_s()
        if kind == "activity":
            words = request.activity.activity
            if request.activity.progress > 0:
                words = f"{words} {request.activity.progress:.0%}"
            return lambda seen: _with_activity(seen, seat, worker, words, now_s)
        if kind == "trained":
            trained = wire.trained_of(request)
            return lambda seen: replace(seen, trained={**seen.trained, seat: trained})
        if kind == "evaluated":
            scores = wire.scores_of(request)
            return lambda seen: replace(seen, scores={**seen.scores, **scores})
        if kind == "failed":
            failure = wire.failure_of(request)
            return lambda seen: replace(seen, failures={**seen.failures, seat: (*seen.failures.get(seat, ()), failure)})
        raise InvalidArgumentError("report: nothing given; allowed: activity, trained, evaluated or failed")


def _with_activity(seen: Seen, seat: SeatIndex, worker: NodeName, words: str, now_s: float) -> Seen:
    """The start time stays while the first word, the kind of activity, does."""
    known = seen.activities.get(seat)
    goes_on = known is not None and known.worker == worker and known.words.split()[:1] == words.split()[:1]
    since_s = known.since_s if goes_on and known is not None else now_s
    return replace(seen, activities={**seen.activities, seat: Activity(worker, words, since_s)})


def _check_pass(request: pb.AttendRequest) -> None:
    """A node behind a gateway has signed its sealing key and proved its region; the gateway may say no others."""
    given = current_pass()
    if given is None:
        return
    for name, said, proven in (
        ("sealing_key", request.sealing_key.hex(), given.sealing_key),
        ("region", request.region, given.region),
    ):
        if said != proven:
            raise ForbiddenError(f"attend: {name} {said!r} given; node {given.node.name!r} proved {proven!r}")


def _own_name(name: str) -> NodeName:
    """A worker speaks only for itself."""
    caller = current_identity()
    if caller.name != name:
        raise ForbiddenError(f"worker {name!r} given; the certificate is that of {caller.name!r}")
    return caller.name


def _caller(context: Any) -> Caller:
    """Who asks: a person behind the gateway, or the operator of the certificate, whose reach is the whole network."""
    identity = current_identity()
    if identity.role is not Role.GATEWAY:
        return Caller(identity.name)
    told = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    name, org = told.get(PRINCIPAL_KEY, "")[:_MAX_NAME], told.get(ORG_KEY, "")[:_MAX_NAME]
    if not name or not org:
        raise ForbiddenError(f"gateway {identity.name!r} does not say for whom it asks ({PRINCIPAL_KEY}, {ORG_KEY})")
    return Caller(name, org, EVERYTHING if told.get(REACH_KEY) == REACH_ALL else Reach(org))


def _read_events(store: Store, *, job_id: JobId, after: int, reach: Reach) -> list[StoredEvent]:
    return store.events(job_id, after, _EVENTS_AT_ONCE, reach)


def _shown(event: StoredEvent) -> EventInfo:
    at = datetime.fromtimestamp(event.at_s, UTC)
    return EventInfo(sequence=event.sequence, at=at, name=event.name, round=event.round, message=event.message)
