"""Which job this node trains in: one that waits for it, or one that it submits."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from cortex.client import Client
from cortex.integration.settings import ManagerSettings
from cortex_common.clock import Clock
from cortex_common.errors import CortexError, InvalidArgumentError, PreconditionError, UnavailableError, Violation
from cortex_common.ids import JobId
from cortex_common.job.parse import parse_job
from cortex_common.job.site_policy import Refusal
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import JobPhase
from cortex_common.logging import get_logger

_log = get_logger(__name__)

_LOOK_S = 5.0
_AGAIN_S = 0.5
_ADMISSION_S = 30.0
_DEADLINE_S = 24 * 3600.0


class Worker(Protocol):
    """As much of a worker as joining needs."""

    async def assigned(self, timeout_s: float) -> JobId | None:
        """The first job it has work of; None if there is none in time."""

    def refusals(self, job: JobSpec) -> Sequence[Refusal]:
        """The rules of its site that a job breaks."""


async def join(worker: Worker, client: Client | None, settings: ManagerSettings, clock: Clock) -> JobId:
    """The job to train in: a running one over this node's data and model that has a place for it, or a new one.

    Raises:
        InvalidArgumentError: there is none, and this site's policy forbids the one to submit: which rules, and what
            they allow.
        PreconditionError: the job failed or was cancelled before this node had work in it.
        CortexError: the network takes no such job.
    """
    name = settings.training.dataset_name
    if client is None:
        _log.info("waiting_for_a_job", dataset=name, reason="only who has an operator's certificate may submit one")
        while (job_id := await worker.assigned(_LOOK_S)) is None:
            pass
        return job_id
    running = {job.job_id for job in await asyncio.to_thread(client.jobs) if not job.status.is_terminal}
    if running:
        job_id = await worker.assigned(_LOOK_S)
        if job_id is not None:
            _log.info("job_joined", job_id=job_id)
            return job_id
    job = job_of(settings)
    if rules := worker.refusals(job):
        subject = f"site policy {settings.security.site_policy}: the job that this program would submit breaks it"
        raise InvalidArgumentError.of(subject, [Violation(each.rule, each.message) for each in rules])
    async for job_id in _submissions(client, job, clock):
        _log.info("job_found" if job_id in running else "job_submitted", job_id=job_id, dataset=name)
        mine = await _placed(worker, client, job_id, settings)
        if mine is not None:
            return mine
        _log.info("job_full", job_id=job_id, places=settings.training.nodes)
    raise CortexError("this job has been run a million times")


async def _placed(worker: Worker, client: Client, job_id: JobId, settings: ManagerSettings) -> JobId | None:
    """Wait until this node has work; say what the job waits for meanwhile. None if others have all its places.

    Raises:
        PreconditionError: the job failed or was cancelled.
    """
    told = ""
    while (mine := await worker.assigned(_LOOK_S)) is None:
        try:
            status = await asyncio.to_thread(client.status, job_id)
        except UnavailableError:
            continue
        if status.status in (JobPhase.FAILED, JobPhase.CANCELLED):
            reason = status.error or "before this node had work in it"
            raise PreconditionError(f"job {job_id} {status.status.value}: {reason}")
        others = {each.worker for each in status.workers} - {settings.network.node_id}
        if status.status.is_terminal or len(others) >= settings.training.nodes:
            return None
        reason = status.waiting_for or "the nodes that have its places"
        # How long it has waited is no news.
        if (news := re.sub(r"\d+", "", reason)) != told:
            told = news
            _log.warning("no_work_yet", job_id=job_id, job_waits_for=reason)
    return mine


def job_of(settings: ManagerSettings) -> JobSpec:
    """The job that the file describes, over this node's own data."""
    training = settings.training
    return parse_job(
        {
            "name": training.dataset_name,
            "model": training.model.model_dump(mode="json")
            | {"init_from": str(training.init_from.absolute()) if training.init_from else None},
            "data": {"train": training.dataset_name, "partition": {"scheme": "local"}},
            "training": {
                "optimizer": training.optimizer,
                "optimizer_options": training.optimizer_options,
                "learning_rate": training.learning_rate,
                "weight_decay": training.weight_decay,
                "batch_size": training.batch_size,
                "local_epochs": training.epochs_per_round,
                "rounds": training.rounds,
                "early_stopping": training.stopping.model_dump() if training.stopping else None,
                "device": training.device,
                "precision": training.precision,
                "seed": training.seed,
            },
            "aggregation": {"deadline": _DEADLINE_S},
            "placement": {"workers": training.nodes, "min_workers": training.min_nodes},
        }
    )


async def _submissions(client: Client, job: JobSpec, clock: Clock) -> AsyncIterator[JobId]:
    """Jobs like this that have not ended, the oldest first, then new ones.

    Programs with the same file, and one that is started again, mean the same job: they find it.
    """
    digest = hashlib.sha256(job.model_dump_json().encode()).hexdigest()[:32]
    for number in range(1, 1_000_000):
        job_id = await _admitted(client, job, f"manager-{digest}-{number}", clock)
        status = await asyncio.to_thread(client.status, job_id)
        if not status.status.is_terminal:
            yield JobId(job_id)


async def _admitted(client: Client, job: JobSpec, request_id: str, clock: Clock) -> str:
    """Submit until the coordinator has heard of this node's data; that takes a heartbeat or two."""
    for attempt in range(int(_ADMISSION_S / _AGAIN_S)):
        try:
            return await asyncio.to_thread(client.submit, job, request_id)
        except InvalidArgumentError as error:
            paths = {violation.path for violation in error.violations}
            if not paths <= {"data.train", "placement"} or (attempt + 1) * _AGAIN_S >= _ADMISSION_S:
                raise
            await clock.sleep(_AGAIN_S)
    raise CortexError("unreachable")
