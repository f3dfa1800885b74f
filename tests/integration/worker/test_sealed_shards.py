"""A worker fetches, opens and forgets the shards it trains on, with a certificate as through a gateway."""

from __future__ import annotations

import asyncio
import gc
import re
import resource
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from benchmarks.processes import tree_of
from cortex.shipping import ship_shards
from cortex_common.data import Partition, load, partition
from cortex_common.data.sealed import Described
from cortex_common.envelope import Envelope
from cortex_common.identity import Role
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from cortex_common.pb.v1 import common_pb2, coordinator_pb2
from cortex_common.security.objects import DataKey
from cortex_common.security.shards import seal_dataset, shard_key
from cortex_common.security.signing import SigningKey
from tests.integration.worker.harness import Network, digits_job
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def sealed(network: Network, folder: Path) -> tuple[Described, DataKey]:
    """The digits in three shards, at the aggregator."""
    digits = load("digits", folder)
    parts = partition(digits.labels, Partition(), 3)
    key = SigningKey.create(folder / "ann.key")
    told, data_key = seal_dataset("digits-7", digits, parts, key, folder / "sealed", datetime.now(UTC))
    tls = network.tls_of(Role.OPERATOR, "ann")
    there: list[int] = []
    for _ in range(2):
        await asyncio.to_thread(ship_shards, network.aggregator_address, tls, folder / "sealed", told, there.append)
    assert there == [0, 1, 2], "each once, however often they are brought"
    return told, data_key


def job_on(told: Described) -> JobSpec:
    return parse_job(digits_job().model_dump(mode="json") | {"data": {"train": told.reference, "test": "digits-test"}})


def part_of(told: Described, keys: list[DataKey], shards: list[int]) -> coordinator_pb2.SealedPart:
    plain = [common_pb2.DataKey(key_id=key.key_id, epoch=key.epoch, key=key.key) for key in keys]
    return coordinator_pb2.SealedPart(manifest=told.envelope.to_json(), shard=shards, key=plain)


def open_shards() -> list[str]:
    """Memory that holds opened shards in this process, where the worker runs."""
    gc.collect()
    names = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [name for name in names if "cortex-shards" in name]


async def test_a_worker_trains_on_its_shards_and_keeps_nothing(network: Network, tmp_path: Path) -> None:
    told, data_key = await sealed(network, tmp_path)
    part = part_of(told, [shard_key(data_key, index) for index in (0, 2)], [0, 2])
    train = await network.next_round(job_on(told), train=coordinator_pb2.TrainWork(), sealed=part)
    trained = (await network.coordinator.report_on(train, "trained")).trained
    assert trained.examples == told.manifest.shards[0].examples + told.manifest.shards[2].examples
    await network.coordinator.assign("w1")
    await eventually(lambda: not open_shards())


@asynccontextmanager
async def served_worker(network: Network, name: str, folder: Path) -> AsyncIterator[int]:
    """A worker as `cortex serve` runs it; its process id."""
    access = await network.access(name, network.coordinator_address)
    token = access.pop("node_token", None)
    if token is not None:
        access["node_token_file"] = folder / "token"
        access["node_token_file"].touch(0o600)
        access["node_token_file"].write_text(token)
    settings = {"name": name, "state_dir": folder / name, "cache_dir": network.folder / "cache", **access}
    config = folder / "worker.yaml"
    config.write_text(yaml.safe_dump({key: str(value) for key, value in settings.items()}))
    command = [sys.executable, "-m", "cortex", "serve", "worker", "--config", str(config)]
    with (folder / "worker.log").open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
    try:
        yield process.pid
    finally:
        process.terminate()
        await process.wait()


def hidden(pids: Iterable[int]) -> set[int]:
    """Those of them that may leave no core dump."""
    limits = {pid: Path(f"/proc/{pid}/limits").read_text() for pid in pids}
    return {pid for pid, text in limits.items() if re.search(r"^Max core file size +0 +0 ", text, re.MULTILINE)}


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="nothing here leaves core dumps")
async def test_a_worker_and_its_trainer_leave_no_core_dump_once_they_open_shards(
    network: Network, tmp_path: Path
) -> None:
    told, data_key = await sealed(network, tmp_path)
    if not network.base:
        network.base = await network.first_version(digits_job())
    part = part_of(told, [shard_key(data_key, 1)], [1])
    async with served_worker(network, "w2", tmp_path) as pid:
        for spec, work in ((digits_job(), {}), (job_on(told), {"sealed": part})):
            network.round += 1
            await network.open_round(network.round, ["w2"], network.base)
            train = network.assignment(spec, network.round, network.base, train=coordinator_pb2.TrainWork(), **work)
            await network.coordinator.assign("w2", train)
            await network.coordinator.report_on(train, "trained")
            found = hidden(tree_of(pid))
            if work:
                assert pid in found
                assert len(found) == 2, "the spare trainer, and what trainers are copied from, have seen nothing"
            else:
                assert not found, "who opens nothing may be looked into"
        await network.coordinator.assign("w2")


async def test_a_manifest_that_is_not_the_jobs_or_not_signed_or_a_wrong_key_opens_nothing(
    network: Network, tmp_path: Path
) -> None:
    told, data_key = await sealed(network, tmp_path)
    own = [shard_key(data_key, 0)]
    unsigned = Described.of(replace(told.envelope, signatures=()))
    changed = Described.of(
        Envelope(told.envelope.payload_type, told.envelope.payload.replace(b"digits-7", b"digits-8"))
    )
    wrong_key = [replace(shard_key(data_key, 1), key_id=own[0].key_id)]
    for part, reason in (
        (part_of(changed, own, [0]), "not the one that the job names"),
        (part_of(unsigned, own, [0]), "not signed by ed25519:"),
        (part_of(told, own, [7]), "allowed: some of 0 to 2"),
        (part_of(told, wrong_key, [0]), "chunk 0 of shard 0 of data set digits-7 does not open"),
    ):
        work = await network.next_round(job_on(told), train=coordinator_pb2.TrainWork(), sealed=part)
        failed = (await network.coordinator.report_on(work, "failed")).failed
        assert reason in failed.reason
        assert not failed.permanent
    await eventually(lambda: not open_shards())
