"""A worker with a policy of its site: nothing of a job runs that breaks it; a policy that changes counts at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cortex_common.job.statement import JobStatement
from cortex_common.pb.v1 import coordinator_pb2
from cortex_common.security.signing import SigningKey
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, ScriptedCoordinator, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")


def signed(key: SigningKey) -> str:
    statement = JobStatement.of(digits_job(), "north", datetime.now(UTC), timedelta(hours=1))
    return key.sign(statement.to_envelope()).to_json()


async def test_only_jobs_that_keep_to_the_policy_run(network: Network, tmp_path: Path, steps_done: StepCount) -> None:
    key, policy = SigningKey.create(tmp_path / "ann.key"), tmp_path / "site-policy.toml"
    signers = f'allowed_signers = [{{name = "ann", key = "{key.public}"}}]\n'
    policy.write_text(signers + "max_rounds = 1\n")
    await network.worker("guarded", site_policy=policy)
    base = await network.first_version(digits_job())
    await network.open_round(1, ["guarded"], base)

    async def ask(**changes: str) -> coordinator_pb2.Assignment:
        work = network.assignment(digits_job(), 1, base, train=coordinator_pb2.TrainWork(), **changes)
        await network.coordinator.assign("guarded", work)
        return work

    refused = await network.coordinator.report_on(await ask(), "failed")
    assert [each.rule for each in refused.failed.refusals] == ["allowed_signers", "max_rounds"]
    work = await ask(signed_job=signed(key))
    refused = await network.coordinator.report_on(work, "failed")
    assert [(each.rule, each.message) for each in refused.failed.refusals] == [
        ("max_rounds", "training.rounds 5 wanted; allowed: up to 1")
    ]
    assert steps_done() == 0

    # The very same work is done once the site allows it: the worker attends anew by itself.
    attended = network.coordinator.attended
    policy.write_text(signers + "max_rounds = 5\nmax_bytes_out = '1MiB'\n")

    def trained(coordinator: ScriptedCoordinator) -> bool:  # it may be refused once more before the change is seen
        mine = [each for each in coordinator.reports if each.assignment_id == work.assignment_id]
        return any(each.WhichOneof("report") == "trained" for each in mine)

    await network.coordinator.until(trained)
    assert network.coordinator.attended > attended
    assert steps_done() == 45
