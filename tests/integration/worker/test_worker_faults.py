"""What a worker does when its trainer dies or its work cannot be done."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cortex_common.clock import SystemClock
from cortex_common.errors import ConflictError, OverloadedError
from cortex_common.ids import JobId
from cortex_common.job.spec import JobSpec
from cortex_common.model import copy_to_arena, manifest_of
from cortex_common.pb.v1 import coordinator_pb2
from cortex_common.telemetry.metrics import REGISTRY
from cortex_common.tensors import Arena, model_sha256
from services.worker.trainer.examples import DataCache
from services.worker.trainer.loop import ModelTrainer
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")
INT8: dict[str, Any] = {"codec": "int8"}
ENDLESS = digits_job(local_seconds=3600.0)


async def trainer_pid(network: Network) -> int:
    slot, _ = network.main.supervisor._jobs[JobId(network.job_id)]
    return (await slot.trainer()).pid


async def until_training(network: Network, assignment: coordinator_pb2.Assignment) -> None:
    """Return once the trainer has told of steps it did."""
    await network.coordinator.until(
        lambda it: any(
            each.activity.metrics.get("steps_per_s")
            for each in it.reports
            if each.assignment_id == assignment.assignment_id
        )
    )


def expected_version(spec: JobSpec, network: Network) -> str:
    """What one undisturbed worker makes of the first version in this round, computed here."""
    torch.set_num_threads(1)
    trainer = ModelTrainer(spec, torch.device("cpu"), SystemClock())
    manifest = manifest_of(trainer.model)
    base, result = Arena.zeros(manifest), Arena.zeros(manifest)
    copy_to_arena(trainer.model, base)
    assert model_sha256(manifest, base) == network.base
    examples = DataCache(spec, network.folder, None).training_part(0, 1, torch.device("cpu"))
    trainer.train(base, result, examples, round_number=network.round, seat=0)
    delta = (result.values - base.values).astype(np.float64)
    return model_sha256(manifest, Arena((base.values + delta).astype(np.float32), base.counters))


async def test_a_killed_trainer_is_reported_and_the_work_can_be_done_again(network: Network) -> None:
    endless = await network.next_round(ENDLESS)
    await until_training(network, endless)
    os.kill(await trainer_pid(network), signal.SIGKILL)
    failed = (await network.coordinator.report_on(endless, "failed")).failed
    assert "ended by signal 9 (SIGKILL)" in failed.reason
    assert not failed.permanent
    again = await network.hand_out(digits_job())
    version = await network.seal(network.round, await network.coordinator.report_on(again, "trained"))
    assert version == expected_version(digits_job(), network)


@pytest.mark.parametrize(
    ("changes", "named", "permanent"),
    [
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "training diverged", True),
        ({"optimizer_options": {"momentum": 0.9}}, "adam allows", True),
        ({"device": "cuda:77"}, "this node has", False),
    ],
)
async def test_settings_that_cannot_work_are_reported_with_their_reason(
    network: Network, changes: dict[str, object], named: str, permanent: bool
) -> None:
    train = await network.next_round(digits_job(**changes))
    failed = (await network.coordinator.report_on(train, "failed")).failed
    assert named in failed.reason
    assert failed.permanent == permanent


async def test_a_model_of_another_layout_is_refused(network: Network) -> None:
    other = digits_job().model_copy(update={"model": digits_job().model.model_copy(update={"hidden_dims": (16,)})})
    train = await network.next_round(other)
    assert "another layout" in (await network.coordinator.report_on(train, "failed")).failed.reason


async def test_work_that_is_no_longer_listed_is_dropped_at_once(network: Network, steps_done: StepCount) -> None:
    await until_training(network, await network.next_round(ENDLESS))
    pid = await trainer_pid(network)
    evaluate = await network.hand_out(digits_job(), evaluate=coordinator_pb2.EvaluateWork(slice=[0], slices=1))
    await network.coordinator.report_on(evaluate, "evaluated")
    assert await trainer_pid(network) == pid, "dropping work needs no new trainer"
    assert steps_done() == 0


async def test_work_the_coordinator_no_longer_wants_is_dropped(network: Network) -> None:
    train = await network.next_round(ENDLESS)
    await until_training(network, train)
    _, runner = network.main.supervisor._jobs[JobId(network.job_id)]
    network.coordinator.unwanted.add(train.assignment_id)
    while runner._wanted:
        await runner._changed.wait()
    assert network.coordinator.count("failed") == 0


async def test_a_job_without_a_place_is_refused_and_the_other_goes_on(network: Network) -> None:
    mine = await network.next_round(ENDLESS)
    await until_training(network, mine)
    other = network.assignment(digits_job(), 1, "ab" * 32, train=coordinator_pb2.TrainWork())
    other.job_id = "another-job"
    await network.coordinator.assign("w1", mine, other)
    failed = (await network.coordinator.report_on(other, "failed")).failed
    assert "no free slot on this worker (1 of 1" in failed.reason
    assert not failed.permanent
    assert "training" in network.main.supervisor.activity


async def test_an_assignment_that_makes_no_sense_is_refused(network: Network) -> None:
    wrong = network.assignment(digits_job(), 1, "ab" * 32)
    await network.coordinator.assign("w1", wrong)
    failed = (await network.coordinator.report_on(wrong, "failed")).failed
    assert "no work that this worker knows" in failed.reason
    assert not failed.permanent, "a newer worker may know it"


async def test_a_report_that_fails_at_the_coordinator_is_made_again(network: Network) -> None:
    network.coordinator.failures = [RuntimeError("no database"), OverloadedError("full"), ConflictError("taken over")]
    train = await network.next_round(digits_job(local_steps=1))
    await network.coordinator.report_on(train, "trained")
    assert not network.coordinator.failures


async def test_a_transfer_goes_on_at_the_address_the_aggregator_has_by_then(network: Network) -> None:
    """The version is asked for where nobody is; the aggregator's new address comes with the same work."""
    train = await network.next_round(digits_job(local_steps=1, seed=5), aggregator_address="127.0.0.1:9", train={})
    _, runner = network.main.supervisor._jobs[JobId(network.job_id)]
    runner._bench.held_sha256 = ""
    await network.coordinator.until(lambda it: "pulling" in it.activities() or "uploading" in it.activities())
    train.aggregator_address = network.aggregator_address
    await network.coordinator.assign("w1", train)
    await network.coordinator.report_on(train, "trained")


async def test_an_update_that_cannot_be_kept_is_sent_all_the_same(network: Network) -> None:
    """Where the residuals should be, there is a file."""
    folder = network.folder / "w1" / "residuals"
    assert not folder.exists()
    folder.parent.mkdir(exist_ok=True)
    folder.write_bytes(b"")
    train = await network.next_round(digits_job(INT8))
    trained = await network.coordinator.report_on(train, "trained")
    assert trained.trained.receipt.weight == 1438
    folder.unlink()


async def test_a_damaged_residual_costs_no_round(network: Network) -> None:
    kept = network.folder / "w1" / "residuals" / network.job_id
    train = await network.next_round(digits_job(INT8))
    await network.coordinator.report_on(train, "trained")
    (blob,) = kept.glob("*.blob")
    blob.write_bytes(bytes(blob.stat().st_size))
    train = await network.next_round(digits_job(INT8, seed=1))
    await network.coordinator.report_on(train, "trained")
    (new,) = kept.glob("*.blob")
    assert new.name != blob.name


async def test_the_disk_that_is_watched_is_the_one_that_holds_the_state(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    await network.worker("w3")
    asked: list[Path] = []

    def usage(path: str) -> object:
        asked.append(Path(path))
        return shutil.disk_usage(path)

    monkeypatch.setattr("cortex_common.telemetry.resources.psutil.disk_usage", usage)
    assert REGISTRY.get_sample_value("cortex_node_disk_free_bytes")
    assert asked[0].name == "w3"
    assert all(each.name != "cache" for each in asked)
