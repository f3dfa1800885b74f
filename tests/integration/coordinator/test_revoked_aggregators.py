"""An aggregator is shut out while a job trains: another takes over, or the job says what it waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.job.wire import status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from services.coordinator.domain.reach import EVERYTHING
from tests.integration.coordinator.harness import ScriptedWorker, Site, hold_at, let_go, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until
from tests.integration.coordinator.test_keys import epochs_of
from tests.integration.coordinator.test_revoked_contributions import WITHIN_S, revoke, until_event

pytestmark = pytest.mark.usefixtures("two_regions")

REGIONAL = {"placement": {"workers": 2}, "aggregation": {"topology": "regional"}}


def crew(cortex: Site) -> list[ScriptedWorker]:
    return [ScriptedWorker(cortex, "w1", 1.0, "eu"), ScriptedWorker(cortex, "w2", 3.0, "us")]


async def until_waiting_for(stub: Any, job_id: str, what: str) -> JobStatus:
    """The first status that says so."""
    async with asyncio.timeout(WITHIN_S):
        async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
            status = status_from_proto(answer.job)
            if what in (status.waiting_for or ""):
                return status
    raise AssertionError(f"the job ended without waiting for {what}")


async def test_a_region_is_served_by_another_under_a_key_that_is_not_for_it(cortex: Site) -> None:
    await announce(cortex, "w1", "w2")
    workers = crew(cortex)
    async with working(*workers), cortex.jobs() as stub:
        hold_at(2, *workers)
        job_id = await submit(stub, job(training={"rounds": 4}, **REGIONAL))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        async with asyncio.timeout(WITHIN_S):
            await revoke(cortex, "aggregator-us")
            # Discovery says that it is shut out and that it is gone; what comes first names the event.
            moved = await until_event(stub, job_id, "aggregator_revoked", "region_moved")
        assert moved.round == 2
        let_go(*workers)
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
    assert [report.accepted for report in status.history] == [2] * 4
    first, second = await epochs_of(cortex, job_id)
    assert second.reason in ("aggregator aggregator-us was revoked", "aggregator aggregator-us left")
    assert second.from_round == 2
    assert set(workers[1].keys) == {first.key_id, second.key_id}


async def test_where_the_versions_are_there_the_job_waits_and_says_so(cortex: Site) -> None:
    await announce(cortex, "w1", "w2")
    workers = crew(cortex)
    async with working(*workers), cortex.jobs() as stub:
        hold_at(2, *workers)
        job_id = await submit(stub, job(training={"rounds": 4}, placement={"workers": 2}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        root = cortex.running.coordinator.running()[0].aggregator
        assert root is not None
        await revoke(cortex, root)
        await until_waiting_for(stub, job_id, f"aggregator {root}: it was revoked, and the job's versions are there")
        let_go(*workers)
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        status = await until(stub, job_id, JobPhase.CANCELLED)
    assert [report.round for report in status.history] == [1]
    assert not [work for worker in workers for work in worker.done if work.split("/")[1].startswith("2.")]


async def test_before_the_first_version_the_job_begins_anew_elsewhere(cortex: Site) -> None:
    await announce(cortex, "w1", "w2")
    workers = crew(cortex)
    for worker in workers:
        worker.idle.clear()
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, job(training={"rounds": 2}, placement={"workers": 2}))
        await until(stub, job_id, JobPhase.DEPLOYING)
        [root] = {each.aggregator for each in cortex.running.coordinator.running()}
        assert root is not None
        await revoke(cortex, root)
        let_go(*workers)
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        [event, *_] = [
            answer.event
            async for answer in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))
            if answer.event.name == "aggregator_revoked"
        ]
    assert event.round == 0
    other = {"aggregator-1": "aggregator-us", "aggregator-us": "aggregator-1"}[root]
    assert (await cortex.running.coordinator.job(status.job_id, EVERYTHING)).aggregator == other
