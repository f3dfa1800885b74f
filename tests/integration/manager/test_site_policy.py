"""`security.site_policy` in the file: a program's own rules for the jobs that train on its data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cortex.integration.joining import join
from cortex.integration.manager import CortexManager
from cortex.integration.settings import load_manager_settings
from cortex_common.clock import SystemClock
from cortex_common.errors import InvalidArgumentError, NotFoundError, PreconditionError
from cortex_common.job.wire import status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from tests.integration.coordinator.harness import site
from tests.integration.manager.embedded import loader_for
from tests.integration.manager.test_own_key import JOB, admitted
from tests.integration.worker.gateways import Nodes
from tests.unit.manager.test_manager_settings import CONTRACT

LOADER = loader_for(JOB)


@pytest.fixture(autouse=True)
def _no_network_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@asynccontextmanager
async def managed(cortex, tls_of, folder: Path, policy: str) -> AsyncIterator[CortexManager]:
    """A manager with such a policy, in a network."""
    (folder / "config.yaml").write_text(CONTRACT)
    (folder / "site-policy.toml").write_text(policy)
    nodes = Nodes(tls_of, folder, cortex.discovery)
    async with nodes.gateway(cortex.coordinator) as url:
        given = {
            "NETWORK__WEBSOCKET_URL": url,
            "NETWORK__TOKEN": (await nodes.token("local_node_1", region="local")).encode(),
            "TRAINING__DATASET": "own",
            "TRAINING__INPUT_DIM": "64",
            "SECURITY__SITE_POLICY": str(folder / "site-policy.toml"),
            "MONITORING__METRICS_PORT": "0",
        }
        yield CortexManager(folder / "config.yaml", {f"CORTEX_{key}": value for key, value in given.items()})


async def test_a_job_that_breaks_a_rule_is_not_worked_for_and_its_status_says_which(tls_of, tmp_path: Path) -> None:
    async with site(tls_of, tmp_path) as cortex, managed(cortex, tls_of, tmp_path, "max_rounds = 1") as manager:
        await manager.initialize()
        training = asyncio.create_task(manager.start_training(LOADER))
        try:
            async with cortex.jobs() as jobs:
                job_id = await admitted(jobs, JOB, training)
                async for answer in jobs.WatchJob(pb.WatchJobRequest(job_id=job_id)):
                    status = status_from_proto(answer.job)
                    if status.refusals:
                        break
            (refusal,) = status.refusals
            assert (refusal.worker, refusal.rule) == ("local_node_1", "max_rounds")
            assert refusal.message == "training.rounds 2 wanted; allowed: up to 1"
            assert status.history == ()
            assert not training.done()
        finally:
            training.cancel()
            await asyncio.wait((training,))


@pytest.mark.parametrize(
    ("policy", "error", "says"),
    [
        ("max_rounds = 'x'\nfoo = 1", InvalidArgumentError, "site-policy.toml: 2 mistakes"),
        (None, NotFoundError, "site-policy.toml cannot be read"),
    ],
)
async def test_a_policy_that_cannot_be_used_is_said_before_anything_is_joined(
    tls_of, tmp_path: Path, policy: str | None, error: type[Exception], says: str
) -> None:
    async with site(tls_of, tmp_path) as cortex, managed(cortex, tls_of, tmp_path, policy or "") as manager:
        if policy is None:
            (tmp_path / "site-policy.toml").unlink()
        with pytest.raises(error, match=says):
            await manager.start_training(LOADER)


class NoWork:
    async def assigned(self, timeout_s: float) -> None:
        return None


class Nobody:
    """A network without jobs, which takes none."""

    def jobs(self) -> list[object]:
        return []


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("max_rounds = 5", "max_rounds: training.rounds 100 wanted; allowed: up to 5"),
        ("allowed_datasets = ['ward-7']", "allowed_datasets"),
        ("min_group = 8", "min_group"),
    ],
)
async def test_a_job_that_this_program_would_not_work_for_itself_is_not_submitted(
    tmp_path: Path, policy: str, says: str
) -> None:
    (tmp_path / "config.yaml").write_text(CONTRACT)
    (tmp_path / "site-policy.toml").write_text(policy)
    settings = load_manager_settings(
        tmp_path / "config.yaml", {"CORTEX_SECURITY__SITE_POLICY": str(tmp_path / "site-policy.toml")}
    )
    with pytest.raises(PreconditionError, match="refuses the job that this program would submit") as raised:
        await join(NoWork(), Nobody(), settings, SystemClock())
    assert says in raised.value.message
