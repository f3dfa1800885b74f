"""Whole jobs through a real coordinator and a real aggregator."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from cortex_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, PreconditionError
from cortex_common.identity import Role
from cortex_common.job.parse import parse_job
from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.job.wire import spec_to_proto, status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from tests.integration.coordinator.harness import LARGE, ScriptedWorker, Site, hold_at, let_go, working
from tests.waiting import eventually


def job(**sections):
    # Workers that discovery has never seen have no datasets to place by: only what the job itself needs is checked.
    base = {
        "model": {"input_dim": 64, "output_dim": 10},
        "data": {"train": "digits", "test": "digits-test"},
        "training": {"rounds": 3, "checkpoint": {"keep": 2}},
        "placement": {"workers": 2},
    }
    return spec_to_proto(parse_job(base | sections))


async def announce(cortex: Site, *names: str) -> None:
    """Tell discovery of workers that have the data."""
    from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc

    datasets = [common_pb2.DatasetInfo(name=name, input_shape=[8, 8], classes=10) for name in ("digits", "digits-test")]
    for name in names:
        async with open_channel(cortex._at("discovery"), cortex.tls_of(Role.WORKER, name), Role.DISCOVERY) as channel:
            node = common_pb2.Node(
                name=name, role=common_pb2.ROLE_WORKER, region="eu", incarnation="one", datasets=datasets
            )
            await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(discovery_pb2.HeartbeatRequest(node=node))


async def submit(stub, spec, request_id="") -> str:
    with calling("coordinator"):
        return (await stub.SubmitJob(pb.SubmitJobRequest(job=spec, request_id=request_id))).job_id


async def until(stub, job_id: str, *phases: JobPhase, round_number: int = 0) -> JobStatus:
    seen = []
    async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
        status = status_from_proto(answer.job)
        if status.status in phases and status.round >= round_number:
            return status
        seen.append(f"{status.status} in round {status.round}: {status.error or 'no error'}")
    raise AssertionError(f"the job never came to {phases}, but to {seen}")


async def test_a_job_runs_to_its_end_and_its_model_is_the_mean_of_the_updates(cortex):
    first, second = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    async with working(first, second), cortex.jobs() as stub:
        job_id = await submit(stub, job())
        status = await until(stub, job_id, JobPhase.COMPLETED)
        assert [report.accepted for report in status.history] == [2, 2, 2]
        assert status.metrics["test_accuracy"] == pytest.approx(0.7)
        assert status.metrics["train_loss"] == pytest.approx(2.0)
        assert status.model is not None

        listed = await stub.ListVersions(pb.ListVersionsRequest(job_id=job_id))
        assert [version.round for version in listed.versions] == [2, 3]
        answers = [answer async for answer in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id))]
        weights = load_safetensors(b"".join(answer.data for answer in answers))
        assert answers[0].version.sha256 == status.model.sha256
        # Seat 0's first version is all ones or all threes; each of three rounds adds the mean, 2.
        first_value = 1.0 if first.done[0].split("/")[2] == "0" else 3.0
        np.testing.assert_array_equal(weights["w"], np.full((4, 3), first_value + 6.0, np.float32))

        with pytest.raises(NotFoundError, match="there are: 2, 3"), calling("coordinator"):
            _ = [part async for part in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id, round=1))]
        events = [e.event.name async for e in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id, follow=True))]
        assert events[0] == "job_submitted"
        assert events[-1] == "job_completed"


async def test_versions_travel_as_deltas_between_exact_ones_through_a_restart_of_the_aggregator(cortex):
    workers = [ScriptedWorker(cortex, name, value, manifest=LARGE) for name, value in (("w1", 1.0), ("w2", 3.0))]
    await announce(cortex, "w1", "w2")
    async with working(*workers), cortex.jobs() as stub:
        download = {"codec": "topk", "options": {"density": 0.1}, "resync_every": 4}
        hold_at(3, *workers)
        job_id = await submit(stub, job(training={"rounds": 7}, compression={"download": download}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=3)
        await cortex.stop("aggregator")
        await cortex.start("aggregator")
        let_go(*workers)
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        answers = [answer async for answer in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id))]
    whole = 4 * LARGE.elements
    for worker in workers:
        pulled = {number: (kind, size) for number, kind, size in worker.pulled}
        assert [kind for kind, _ in pulled.values()] == ["model", *["delta"] * 2, "model", *["delta"] * 2, "model"]
        assert all(size < 0.15 * whole for kind, size in pulled.values() if kind == "delta")
    # Nine numbers in ten waited in the residual; the last version has them all.
    weights = load_safetensors(b"".join(answer.data for answer in answers))["w"]
    assert len(np.unique(weights)) == 1
    assert weights[0, 0] in (1 + 7 * 2, 3 + 7 * 2)


async def test_a_job_survives_restarts_of_coordinator_aggregator_and_discovery(cortex):
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    async with working(*workers):
        async with cortex.jobs() as stub:
            hold_at(1, *workers)
            job_id = await submit(stub, job(training={"rounds": 6}))
            await until(stub, job_id, JobPhase.TRAINING, round_number=1)
        await cortex.stop("coordinator")
        await cortex.stop("discovery")
        await cortex.stop("aggregator")
        for service in ("discovery", "aggregator", "coordinator"):
            await cortex.start(service)
        await announce(cortex, "w1", "w2")
        let_go(*workers)
        async with cortex.jobs() as stub:
            status = await until(stub, job_id, JobPhase.COMPLETED)
    assert [report.round for report in status.history] == [1, 2, 3, 4, 5, 6]
    assert all(report.accepted == 2 for report in status.history)


async def test_a_job_waits_for_workers_and_says_so_then_is_cancelled(cortex):
    async with cortex.jobs() as stub:
        job_id = await submit(stub, job())
        status = status_from_proto((await stub.GetJob(pb.GetJobRequest(job_id=job_id))).job)
        assert status.status is JobPhase.SUBMITTED
        assert status.waiting_for is not None
        assert "0 of 2 ready" in status.waiting_for
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        status = await until(stub, job_id, JobPhase.CANCELLED)
        assert status.finished_at is not None
        with pytest.raises(PreconditionError, match="cancelled"), calling("coordinator"):
            await stub.PauseJob(pb.PauseJobRequest(job_id=job_id))


async def test_a_workers_permanent_failure_is_the_jobs_error(cortex):
    worker = ScriptedWorker(cortex, "w1", 1.0)
    worker.refuse = "training diverged (loss is not finite)"
    await announce(cortex, "w1")
    async with working(worker), cortex.jobs() as stub:
        job_id = await submit(stub, job(placement={"workers": 1}))
        status = await until(stub, job_id, JobPhase.FAILED)
    assert status.error == "worker w1: training diverged (loss is not finite)"


async def test_pause_and_resume(cortex):
    worker = ScriptedWorker(cortex, "w1", 1.0)
    await announce(cortex, "w1")
    async with working(worker), cortex.jobs() as stub:
        worker.hold_at(2)
        job_id = await submit(stub, job(placement={"workers": 1}, training={"rounds": 40}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        await stub.PauseJob(pb.PauseJobRequest(job_id=job_id))
        worker.let_go()
        paused = await until(stub, job_id, JobPhase.PAUSED)
        assert paused.round < 40
        await stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id))
        assert len((await until(stub, job_id, JobPhase.COMPLETED)).history) == 40


async def test_two_jobs_share_the_workers_one_after_the_other(cortex):
    worker = ScriptedWorker(cortex, "w1", 1.0)
    await announce(cortex, "w1")
    async with working(worker), cortex.jobs() as stub:
        ids = [await submit(stub, job(name=name, placement={"workers": 1})) for name in ("one", "two")]
        done = await asyncio.gather(*(until(stub, job_id, JobPhase.COMPLETED) for job_id in ids))
    assert [status.name for status in done] == ["one", "two"]
    assert done[0].finished_at <= done[1].finished_at


async def test_every_mistake_comes_back_with_its_path(cortex):
    wrong = pb.SubmitJobRequest()
    wrong.job.model.input_dim = 0
    wrong.job.data.train = "digits"
    wrong.job.training.optimizer = "adamm"
    async with cortex.jobs() as stub:
        with pytest.raises(InvalidArgumentError) as caught, calling("coordinator"):
            await stub.SubmitJob(wrong)
    assert {v.path for v in caught.value.violations} == {"model.input_dim", "model.output_dim", "training.optimizer"}


async def test_what_this_network_cannot_run_is_refused_at_once(cortex):
    async with cortex.jobs() as stub:
        with pytest.raises(InvalidArgumentError, match="no node has such a dataset"), calling("coordinator"):
            await submit(stub, job(data={"train": "nope"}))
        with pytest.raises(InvalidArgumentError, match="inputs of digits have 64 values"), calling("coordinator"):
            await submit(stub, job(model={"input_dim": 784, "output_dim": 10}))


async def test_a_request_id_makes_submitting_twice_harmless(cortex):
    async with cortex.jobs() as stub:
        ids = await asyncio.gather(*(submit(stub, job(), "same") for _ in range(20)))
        assert len(set(ids)) == 1
        with pytest.raises(AlreadyExistsError, match="used for another job"):
            await submit(stub, job(name="other"), "same")
        assert len((await stub.ListJobs(pb.ListJobsRequest())).jobs) == 1
    async with cortex.jobs(Role.OPERATOR, "somebody-else") as stub:
        assert await submit(stub, job(), "same") != ids[0], "ids of different callers are different"


async def test_an_unknown_job_is_not_found(cortex):
    async with cortex.jobs() as stub:
        for call in (
            stub.GetJob(pb.GetJobRequest(job_id="x")),
            stub.CancelJob(pb.CancelJobRequest(job_id="x")),
            stub.ListVersions(pb.ListVersionsRequest(job_id="x")),
        ):
            with pytest.raises(NotFoundError, match="no job 'x'"), calling("coordinator"):
                await call


async def test_a_worker_speaks_only_for_itself(cortex):
    tls = cortex.tls_of(Role.WORKER, "w1")
    async with open_channel(cortex.coordinator, tls, Role.COORDINATOR) as channel:
        stub = coordinator_pb2_grpc.AssignmentServiceStub(channel)
        call = stub.Attend(pb.AttendRequest(worker="w2", incarnation="one", slots=1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_second_coordinator_on_the_same_state_is_refused(cortex):
    cortex._running["first"] = cortex._running.pop("coordinator")
    port = cortex._ports.pop("coordinator")
    try:
        with pytest.raises(PreconditionError, match="another coordinator is running"):
            await cortex.start("coordinator")
    finally:
        cortex._ports["coordinator"] = port


async def test_a_stranger_cannot_report_about_a_seat_that_is_not_its_own(cortex):
    worker = ScriptedWorker(cortex, "w1", 1.0)
    worker.idle.clear()
    await announce(cortex, "w1")
    async with working(worker), cortex.jobs() as stub:
        job_id = await submit(stub, job(placement={"workers": 1}, data={"train": "digits"}))
        await until(stub, job_id, JobPhase.DEPLOYING)
        report = pb.ReportRequest(
            worker="evil", incarnation="one", assignment_id=f"{job_id}/0.1/0/initialise", job_id=job_id, seat=0
        )
        report.failed.reason, report.failed.permanent = "because I can", True
        async with open_channel(cortex.coordinator, cortex.tls_of(Role.WORKER, "evil"), Role.COORDINATOR) as channel:
            answer = await coordinator_pb2_grpc.AssignmentServiceStub(channel).Report(report)
        assert not answer.wanted
        worker.idle.set()
        assert (await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)).status is JobPhase.COMPLETED


async def test_a_submission_given_up_in_the_middle_is_a_job_that_runs(cortex):
    async with cortex.jobs() as stub:
        for delay_s in (0.0, 0.001, 0.002, 0.004, 0.008):
            call = stub.SubmitJob(pb.SubmitJobRequest(job=job(), request_id=f"r{delay_s}"))
            await asyncio.sleep(delay_s)
            call.cancel()
        for delay_s in (0.0, 0.001, 0.002, 0.004, 0.008):
            job_id = await submit(stub, job(), f"r{delay_s}")
            await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
            assert (await until(stub, job_id, JobPhase.CANCELLED)).status is JobPhase.CANCELLED


def _holds_updates(spool: Path) -> bool:
    """Whether a spool that may be vanishing has an update in it."""
    return any(name.startswith("seat-") for _, _, names in os.walk(spool) for name in names)


async def test_a_job_cancelled_while_it_collects_leaves_nothing_in_the_spool(cortex, tmp_path):
    first, second = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 1.0)
    await announce(cortex, "w1", "w2")
    async with working(first, second), cortex.jobs() as stub:
        job_id = await submit(stub, job(data={"train": "digits"}, training={"rounds": 500}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        second.idle.clear()
        spool = tmp_path / "aggregator" / "spool" / job_id
        await eventually(lambda: _holds_updates(spool))
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        await until(stub, job_id, JobPhase.CANCELLED)
        await eventually(lambda: not _holds_updates(spool))


async def test_a_coordinator_that_comes_back_knows_its_jobs_before_anybody_is_answered(cortex):
    """Told that nothing is wanted, a worker would end its trainer, or bar work that it is asked for right after."""
    worker = ScriptedWorker(cortex, "w1", 1.0)
    await announce(cortex, "w1")
    async with working(worker), cortex.jobs() as stub:
        hold_at(1, worker)
        job_id = await submit(stub, job(placement={"workers": 1}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=1)
        await eventually(lambda: not worker.idle.is_set())
    # The aggregator is away too: that the round is open there cannot be seen.
    await cortex.stop("aggregator")
    await cortex.stop("coordinator")
    await cortex.start("coordinator")
    assert [each.id for each in cortex.running.coordinator.running()] == [job_id], "a report may come at once"
    async with open_channel(cortex.coordinator, cortex.tls_of(Role.WORKER, "w1"), Role.COORDINATOR) as channel:
        line = coordinator_pb2_grpc.AssignmentServiceStub(channel).Attend(
            pb.AttendRequest(worker="w1", region="eu", incarnation="one", slots=1, sealing_key=worker.sealing.public)
        )
        first = await anext(aiter(line))
        line.cancel()
    assert [(each.round, each.WhichOneof("work")) for each in first.assignments] == [(1, "hold")]
