"""`security.site_policy` in the file: a program takes part in nothing, and submits nothing, that its site forbids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cortex.integration.manager import CortexManager
from cortex_common.errors import InvalidArgumentError, NotFoundError, PreconditionError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import JobPhase
from cortex_common.job.wire import status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from tests.integration.coordinator.harness import site
from tests.integration.coordinator.test_jobs import until
from tests.integration.manager.embedded import admitted, loader_for
from tests.integration.worker.gateways import Nodes
from tests.unit.manager.test_manager_settings import CONTRACT
from tests.waiting import eventually


def job(rounds: int) -> JobSpec:
    return parse_job(
        {
            "model": {"input_dim": 64, "hidden_dims": [16], "output_dim": 10},
            "data": {"train": "own", "partition": {"scheme": "local"}},
            "training": {"rounds": rounds},
            "placement": {"workers": 1},
        }
    )


def manager_of(folder: Path, policy: Path, given: Mapping[str, str] | None = None) -> CortexManager:
    (folder / "config.yaml").write_text(CONTRACT)
    values = {"SECURITY__SITE_POLICY": str(policy), "MONITORING__METRICS_PORT": "0", **(given or {})}
    return CortexManager(folder / "config.yaml", {f"CORTEX_{key}": value for key, value in values.items()})


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tmp_path / "site-policy.toml"


@pytest.fixture(autouse=True)
def _no_network_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@asynccontextmanager
async def network(tls_of: Any, folder: Path, policy: Path) -> AsyncIterator[tuple[Any, CortexManager]]:
    """A network in this process, whose jobs can be asked about, and a program that it lets in."""
    async with site(tls_of, folder) as cortex:
        nodes = Nodes(tls_of, folder, cortex.discovery)
        async with nodes.gateway(cortex.coordinator) as url, cortex.jobs() as jobs:
            token = await nodes.token("local_node_1", region="local")
            given = {"NETWORK__WEBSOCKET_URL": url, "NETWORK__TOKEN": token.encode()}
            given |= {"TRAINING__DATASET": "own", "TRAINING__INPUT_DIM": "64", "TRAINING__HIDDEN_DIMS": "[16]"}
            manager = manager_of(folder, policy, given)
            await manager.initialize()
            yield jobs, manager


async def test_a_program_joins_no_job_that_breaks_the_policy_until_that_allows_it(tls_of, tmp_path, policy) -> None:
    policy.write_text("max_rounds = 1\n")
    async with network(tls_of, tmp_path, policy) as (jobs, manager):
        training = asyncio.create_task(manager.start_training(loader_for(job(2))))
        job_id = await admitted(jobs, job(2), training)
        async for answer in jobs.WatchJob(pb.WatchJobRequest(job_id=job_id)):
            status = status_from_proto(answer.job)
            if status.refusals:
                break
        (refusal,) = status.refusals
        assert (refusal.worker, refusal.rule) == ("local_node_1", "max_rounds")
        assert refusal.message == "training.rounds 2 wanted; allowed: up to 1"
        assert not training.done()
        assert manager.status is None, "it is not in that job"

        policy.write_text("max_rounds = 2\n")
        ended = await training
        assert (ended.status, ended.job_id, len(manager.history)) == (JobPhase.COMPLETED, job_id, 2)


async def test_a_program_whose_job_is_forbidden_meanwhile_ends_with_the_file_and_the_rule(
    tls_of, tmp_path, policy
) -> None:
    policy.write_text("max_rounds = 5000\n")
    async with network(tls_of, tmp_path, policy) as (jobs, manager):
        training = asyncio.create_task(manager.start_training(loader_for(job(5000))))
        job_id = await admitted(jobs, job(5000), training)
        await eventually(lambda: training.done() or len(manager.history) > 0)
        # A file that is wrong for a while ends nothing.
        policy.write_text("max_rounds = 0\n")
        async for answer in jobs.WatchJob(pb.WatchJobRequest(job_id=job_id)):
            if {each.rule for each in status_from_proto(answer.job).refusals} == {"site_policy"}:
                break
        assert not training.done()
        policy.write_text("max_rounds = 1\n")
        with pytest.raises(PreconditionError) as caught:
            await asyncio.wait_for(training, 30)
        assert caught.value.message == (
            f"site policy {policy}: this node takes no part in job {job_id} any more: "
            "max_rounds: training.rounds 5000 wanted; allowed: up to 1"
        )
        await jobs.CancelJob(pb.CancelJobRequest(job_id=job_id))
        await until(jobs, job_id, JobPhase.CANCELLED)


class Operator:
    """An operator's connection that counts what is submitted; no job runs."""

    def __init__(self) -> None:
        self.submitted: list[JobSpec] = []

    def jobs(self) -> Sequence[Any]:
        return ()

    def submit(self, job: JobSpec, request_id: str) -> str:
        self.submitted.append(job)
        raise NotFoundError("this is as far as it goes")


async def test_a_program_does_not_submit_what_its_site_forbids_and_names_file_key_and_what_is_allowed(
    tls_of, tmp_path, policy
) -> None:
    rules = 'max_rounds = 50\nallowed_datasets = ["ward-7"]\n'
    policy.write_text(rules)
    async with network(tls_of, tmp_path, policy) as (_, manager):
        operator = Operator()
        manager._access.client = operator  # type: ignore[assignment, union-attr]
        with pytest.raises(InvalidArgumentError) as caught:
            await manager.start_training(loader_for(job(2)))
        assert caught.value.message == (
            f"site policy {policy}: the job that this program would submit breaks it: 2 mistakes\n"
            "  max_rounds: training.rounds 100 wanted; allowed: up to 50\n"
            "  allowed_datasets: own wanted; allowed: ward-7"
        )
        assert operator.submitted == []
        policy.write_text('max_rounds = 100\nallowed_datasets = ["own"]\n')
        with pytest.raises(NotFoundError, match="as far as it goes"):
            await manager.start_training(loader_for(job(2)))
        assert len(operator.submitted) == 1


async def test_a_policy_that_cannot_be_used_stops_the_program_before_it_connects(tmp_path, policy) -> None:
    policy.write_text("max_rounds = 0\nmax_rouns = 1\n")
    with pytest.raises(InvalidArgumentError, match=r"site policy .*site-policy\.toml: 2 mistakes") as caught:
        await manager_of(tmp_path, policy).initialize()
    assert {each.path for each in caught.value.violations} == {"max_rounds", "max_rouns"}
    policy.unlink()
    with pytest.raises(NotFoundError, match=r"site-policy\.toml cannot be read"):
        await manager_of(tmp_path, policy).initialize()
