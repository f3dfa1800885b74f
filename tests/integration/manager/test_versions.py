"""A program that cannot get a model goes on, or says so: it waits for ever for none."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cortex.integration import manager as manager_module
from cortex.integration.manager import CortexManager
from cortex.integration.reporting import Bar, Scalars
from cortex_common.errors import PreconditionError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.job.status import JobPhase, JobStatus, ModelSummary
from services.worker import embedded as embedded_module
from tests.integration.manager.embedded import embedded
from tests.integration.worker.harness import digits_job, network_of
from tests.unit.manager.test_manager_settings import CONTRACT
from tests.waiting import eventually

NOBODY = "127.0.0.1:9"


async def test_a_version_of_an_aggregator_that_is_away_is_not_waited_for_for_ever(
    tls_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_module, "MODEL_PATIENCE_S", 0.5)
    job = digits_job()
    async with network_of(tls_of, tmp_path, "websocket") as network:
        access = await network.access("m1", network.coordinator_address)
        async with embedded(network, "m1", job, access) as worker:
            hold = network.assignment(job, 1, "ab" * 32, hold={}, aggregator_address=NOBODY)
            await network.coordinator.assign("m1", hold)
            await eventually(lambda: JobId(network.job_id) in worker._assigned)
            async with asyncio.timeout(30):
                with pytest.raises(UnavailableError, match="cannot be reached"):
                    await worker.model(JobId(network.job_id), "ab" * 32, 0)


class Away:
    """A worker whose network is gone."""

    async def model(self, *_: object) -> None:
        raise UnavailableError("the gateway cannot be reached")


@pytest.mark.parametrize(
    ("phase", "error", "says"),
    [
        (JobPhase.CANCELLED, PreconditionError, "job j1 cancelled"),
        (JobPhase.FAILED, PreconditionError, "job j1 failed: aggregator agg-1 is gone"),
        (JobPhase.COMPLETED, UnavailableError, "the gateway cannot be reached"),
    ],
)
async def test_how_a_job_has_ended_is_told_also_where_its_model_cannot_be_had(
    tmp_path: Path, phase: JobPhase, error: type[Exception], says: str
) -> None:
    (tmp_path / "config.yaml").write_text(CONTRACT)
    manager = CortexManager(tmp_path / "config.yaml", {})
    manager._worker = Away()
    status = JobStatus(
        job_id="j1",
        name="own",
        status=phase,
        round=3,
        rounds=5,
        model=ModelSummary(round=3, sha256="ab" * 32, parameters=1),
        error="aggregator agg-1 is gone" if phase is JobPhase.FAILED else None,
        submitted_at=datetime.now(UTC),
    )
    with pytest.raises(error, match=says):
        await manager._ended(JobId("j1"), status)


class Silent:
    """A worker with a line to a gateway that knows nothing of its job."""

    activity = "idle"

    def refused(self, _job: JobId) -> tuple[()]:
        return ()

    async def status(self, job_id: JobId) -> JobStatus:
        raise UnavailableError(f"node 'n1' has no assignment of job '{job_id}' here yet; retry")

    async def changed(self, _timeout_s: float) -> None:
        await asyncio.sleep(0)


async def test_a_program_does_not_wait_for_ever_for_a_job_of_which_nobody_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "_SILENCE_S", 0.2)
    (tmp_path / "config.yaml").write_text(CONTRACT)
    manager = CortexManager(tmp_path / "config.yaml", {})
    manager._worker = Silent()
    async with asyncio.timeout(30):
        with pytest.raises(UnavailableError, match="job j1: nobody says any more where it stands: node 'n1' has no"):
            await manager._follow(JobId("j1"), Bar(None), Scalars(None))
