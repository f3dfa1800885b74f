"""A signed job reaches its workers in its envelope; who refuses it is in the status, and others do the work."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.statement import JobStatement
from cortex_common.job.status import JobPhase
from cortex_common.job.wire import spec_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.rpc.errors import calling
from cortex_common.security.signing import SigningKey
from tests.integration.coordinator.harness import ScriptedWorker, TlsOf, site, working
from tests.integration.coordinator.test_jobs import announce, job, until


class GuardedWorker(ScriptedWorker):
    """Refuses every job by a rule of its site, and keeps what it was given."""

    envelopes: tuple[str, ...] = ()

    async def _do(self, stub: Any, assignment: pb.Assignment) -> None:
        self.envelopes = (*self.envelopes, assignment.signed_job)
        report = pb.ReportRequest(worker=self.name, incarnation=self._incarnation, job_id=assignment.job_id)
        report.assignment_id, report.seat, report.round = assignment.assignment_id, assignment.seat, assignment.round
        report.failed.refusals.add(rule="max_rounds", message="3 wanted; allowed: up to 1")
        await stub.Report(report)


async def test_a_signed_job_is_handed_on_unchanged_and_done_by_those_who_take_it(tls_of: TlsOf, tmp_path: Path) -> None:
    spec = spec_from_proto(job(placement={"workers": 1}))
    statement = JobStatement.of(spec, "north", datetime.now(UTC), timedelta(hours=1))
    envelope = SigningKey.create(tmp_path / "ann.key").sign(statement.to_envelope()).to_json()
    async with site(tls_of, tmp_path) as cortex:
        guarded, other = GuardedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
        await announce(cortex, "w1", "w2")
        async with cortex.jobs() as stub, working(guarded):
            job_id = (await stub.SubmitJob(pb.SubmitJobRequest(signed_job=envelope, request_id="r"))).job_id
            async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
                if "refused by w1 (max_rounds)" in answer.job.waiting_for:
                    break
            told = [(each.worker, each.rule, each.message) for each in answer.job.refusals]
            assert told == [("w1", "max_rounds", "3 wanted; allowed: up to 1")]
            assert set(guarded.envelopes) == {envelope}
            async with working(other):
                status = await until(stub, job_id, JobPhase.COMPLETED)
            assert [report.accepted for report in status.history] == [1, 1, 1]
            again = await stub.SubmitJob(pb.SubmitJobRequest(signed_job=envelope, request_id="r"))
            assert again.job_id == job_id
            both = pb.SubmitJobRequest(job=job(), signed_job=envelope)
            with pytest.raises(InvalidArgumentError, match="one of them"), calling("coordinator"):
                await stub.SubmitJob(both)
