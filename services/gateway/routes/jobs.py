"""/api/v1/jobs: submit, follow, steer, download."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from cortex_common.envelope import Envelope
from cortex_common.errors import CortexError, InvalidArgumentError, Violation
from cortex_common.ids import JobId
from cortex_common.job.spec import JobSpec
from cortex_common.job.statement import statement_of
from cortex_common.job.status import EventInfo, JobPhase, JobStatus, VersionInfo
from cortex_common.logging import get_logger
from cortex_common.security.tokens import Principal
from services.gateway import examples, sse
from services.gateway.auth import Reader, Submitter
from services.gateway.body import read_job
from services.gateway.following import unbroken
from services.gateway.openapi import EVENTS, JOB_BODY, MODEL_FILE, example
from services.gateway.problems import responses
from services.gateway.surroundings import Surroundings, surroundings_of

log = get_logger(__name__)
router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])

JobIdInPath = Annotated[str, Path(max_length=128, description="As answered by submit")]
_SEQUENCE = re.compile(r"[0-9]{1,18}")
_STATUS = example(examples.STATUS)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")


class Submitted(BaseModel):
    """A job that is stored, and where it can be followed. `status` is its first one."""

    job_id: str
    status: JobPhase
    dataset: str
    links: dict[str, str]


class JobList(BaseModel):
    """Jobs, newest first, without their history."""

    jobs: list[JobStatus]


class VersionList(BaseModel):
    """The model versions of a job that are kept, oldest first."""

    versions: list[VersionInfo]


class EventStream(StreamingResponse):
    """Events for as long as somebody reads them; its place among the open streams is given back at the end."""

    def __init__(self, events: AsyncGenerator[bytes], place: ExitStack) -> None:
        super().__init__(events, media_type=sse.MEDIA_TYPE)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with self._place:
            await super().__call__(scope, receive, send)


class FileStream(StreamingResponse):
    """A file in pieces. If it breaks off, so does the connection: what has arrived cannot be taken for the whole."""

    async def stream_response(self, send: Send) -> None:
        """Send the pieces; without a last message the server closes the connection."""
        try:
            await super().stream_response(send)
        except CortexError as error:
            log.warning("download_broken", reason=error.message)


@router.post(
    "/submit",
    status_code=201,
    responses=example(examples.SUBMITTED, 201) | responses(400, 401, 403, 409, 413, 415, 422, 429, 503),
    **JOB_BODY,
)
async def submit(
    request: Request,
    principal: Submitter,
    response: Response,
    idempotency_key: Annotated[str, Header(description="Makes a retry safe: the same key gives the same job")] = "",
) -> Submitted:
    """Submit a training job, as JSON or YAML: a job file, `model_config` and `training_config`, or a signed job (DSSE).

    Answers when it is stored; all mistakes are told at once.
    """
    if idempotency_key and not _REQUEST_ID.fullmatch(idempotency_key):
        mistake = Violation("header.idempotency-key", "allowed: 1 to 200 visible ASCII characters")
        raise InvalidArgumentError.of("request", [mistake])
    surroundings = surroundings_of(request)
    job = await read_job(request, surroundings.nodes.nodes)
    job_id = await surroundings.jobs.submit(job, idempotency_key, principal)
    links = _links(job_id)
    response.headers["Location"] = links["status"]
    return Submitted(job_id=job_id, status=JobPhase.SUBMITTED, dataset=_dataset_of(job), links=links)


@router.get(
    "",
    response_model=JobList,
    responses=example({"jobs": [{**examples.STATUS, "history": []}]}) | responses(401, 403, 422, 503),
)
async def jobs(request: Request, principal: Reader, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
    """The newest jobs, without their history."""
    found = await surroundings_of(request).jobs.jobs(limit, principal)
    return _json(JobList(jobs=list(found)))


@router.get("/{job_id}/status", response_model=JobStatus, responses=_STATUS | responses(401, 403, 404, 422, 503))
async def status(request: Request, principal: Reader, job_id: JobIdInPath) -> Response:
    """Where a job stands: status, metrics, history, and what it waits for."""
    return _json(await surroundings_of(request).jobs.status(JobId(job_id), principal))


@router.post("/{job_id}/cancel", response_model=JobStatus, responses=_STATUS | responses(401, 403, 404, 409, 422, 503))
async def cancel(request: Request, principal: Submitter, job_id: JobIdInPath) -> Response:
    """End a job; doing it again changes nothing."""
    clients = surroundings_of(request).jobs
    await clients.cancel(JobId(job_id), principal)
    return _json(await clients.status(JobId(job_id), principal))


@router.post("/{job_id}/pause", response_model=JobStatus, responses=_STATUS | responses(401, 403, 404, 409, 422, 503))
async def pause(request: Request, principal: Submitter, job_id: JobIdInPath) -> Response:
    """Hold a job after the round in progress."""
    clients = surroundings_of(request).jobs
    await clients.pause(JobId(job_id), principal)
    return _json(await clients.status(JobId(job_id), principal))


@router.post("/{job_id}/resume", response_model=JobStatus, responses=_STATUS | responses(401, 403, 404, 409, 422, 503))
async def resume(request: Request, principal: Submitter, job_id: JobIdInPath) -> Response:
    """Let a paused job go on."""
    clients = surroundings_of(request).jobs
    await clients.resume(JobId(job_id), principal)
    return _json(await clients.status(JobId(job_id), principal))


@router.get(
    "/{job_id}/versions",
    response_model=VersionList,
    responses=example(examples.VERSIONS) | responses(401, 403, 404, 422, 503),
)
async def versions(request: Request, principal: Reader, job_id: JobIdInPath) -> Response:
    """The model versions of a job that are kept: round, metrics, digest."""
    found = await surroundings_of(request).jobs.versions(JobId(job_id), principal)
    return _json(VersionList(versions=list(found)))


@router.get(
    "/{job_id}/model", response_class=StreamingResponse, responses=MODEL_FILE | responses(401, 403, 404, 422, 503)
)
async def model(
    request: Request,
    principal: Reader,
    job_id: JobIdInPath,
    round_number: Annotated[
        int | None, Query(alias="round", ge=0, lt=1 << 32, description="The newest if unset")
    ] = None,
    if_none_match: Annotated[str, Header()] = "",
) -> Response:
    """The model as a safetensors file. Its SHA-256 is the ETag and stands in X-Model-Sha256."""
    download = await surroundings_of(request).jobs.download(JobId(job_id), round_number, principal)
    version = download.version
    headers = {"ETag": f'"{version.sha256}"', "X-Model-Sha256": version.sha256, "X-Model-Round": str(version.round)}
    if version.sha256 in if_none_match:
        await download.pieces.aclose()
        return Response(status_code=304, headers=headers)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{version.job_id}-round-{version.round}.safetensors")
    headers |= {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(version.size_bytes)}
    return FileStream(download.pieces, headers=headers, media_type="application/octet-stream")


@router.get(
    "/{job_id}/events", response_class=StreamingResponse, responses=EVENTS | responses(401, 403, 404, 422, 429, 503)
)
async def events(
    request: Request,
    principal: Reader,
    job_id: JobIdInPath,
    kind: Annotated[
        Literal["status", "events"], Query(description="Status objects, or the job's log of events")
    ] = "status",
    follow: Annotated[bool, Query(description="events: wait for new ones until the job has ended")] = True,
    after: Annotated[int, Query(ge=0, lt=1 << 63, description="events: only those after this sequence number")] = 0,
    last_event_id: Annotated[str, Header(description="As `after`; sent by browsers that connect again")] = "",
) -> Response:
    """Server-sent events until the job has ended; the last one is named `end` (or `problem`, with its cause).

    A token that is revoked or expires meanwhile ends them with a `problem`.
    """
    surroundings, job = surroundings_of(request), JobId(job_id)
    with ExitStack() as place:
        place.enter_context(surroundings.streams.place())
        await surroundings.jobs.status(job, principal)  # an unknown job is a 404, not an empty stream
        if kind == "status":
            source = _status_events(surroundings, job, principal)
        else:
            start = int(last_event_id) if _SEQUENCE.fullmatch(last_event_id) else after
            source = _log_events(surroundings, job, principal, start, follow=follow)
        return EventStream(_stream(source, surroundings, principal), place.pop_all())


async def _stream(
    source: AsyncGenerator[sse.ServerEvent], around: Surroundings, principal: Principal
) -> AsyncGenerator[bytes]:
    require = partial(around.access.require_still, principal)
    async with aclosing(sse.encoded_events(source, around.clock, around.stopping, require)) as encoded:
        async for piece in encoded:
            yield piece


async def _status_events(around: Surroundings, job_id: JobId, principal: Principal) -> AsyncGenerator[sse.ServerEvent]:
    """The status at each change; a connection opened again tells the present one, which may have been told."""
    told = ""
    watch = unbroken(lambda: around.jobs.watch(job_id, principal), around.clock, around.watch_patience_s)
    async with aclosing(watch) as statuses:
        async for status in statuses:
            text = status.model_dump_json()
            if text != told:
                told = text
                yield sse.ServerEvent("status", text)


async def _log_events(
    around: Surroundings, job_id: JobId, principal: Principal, after: int, *, follow: bool
) -> AsyncGenerator[sse.ServerEvent]:
    """Each event once, in order."""
    seen = after

    def opened() -> AsyncGenerator[EventInfo]:
        return around.jobs.events(job_id, follow=follow, after=seen, principal=principal)

    async with aclosing(unbroken(opened, around.clock, around.watch_patience_s)) as found:
        async for event in found:
            seen = event.sequence
            yield sse.ServerEvent("event", event.model_dump_json(), str(event.sequence))


def _dataset_of(job: JobSpec | Envelope) -> str:
    """What is trained on, also when the job is signed."""
    return (job if isinstance(job, JobSpec) else statement_of(job).job).data.train


def _links(job_id: JobId) -> dict[str, str]:
    job = f"{router.prefix}/{job_id}"
    return {name: f"{job}/{name}" for name in ("status", "events", "versions", "model", "cancel", "pause", "resume")}


def _json(shown: BaseModel) -> Response:
    """As JSON; pydantic writes values JSON cannot hold (a loss that is not a number) as null."""
    return Response(shown.model_dump_json(), media_type="application/json")
