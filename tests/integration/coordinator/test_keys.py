"""Data keys of real jobs: wrapped to members, wrapped at rest."""

from __future__ import annotations

import sqlite3

import grpc
import pytest

from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.keyring import FileKeyring
from cortex_common.security.sealing import SealingKey
from tests.integration.coordinator.harness import ScriptedWorker, site, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until


@pytest.fixture
async def cortex(tls_of, tmp_path):
    async with site(tls_of, tmp_path) as made:
        yield made


def files_with(folder, needles):
    return [
        path for path in folder.rglob("*") if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


async def test_no_data_key_is_written_anywhere_but_wrapped(cortex, tmp_path):
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, job())
        await until(stub, job_id, JobPhase.COMPLETED)
    (opened,) = workers[0].keys.values()
    assert workers[1].keys == workers[0].keys
    assert files_with(tmp_path, (opened.key, opened.key.hex().encode())) == []
    database = tmp_path / "coordinator" / "coordinator.db"
    with sqlite3.connect(database) as db:
        ((epoch, key_id, kek_id),) = db.execute("select epoch, key_id, kek_id from data_key where job_id = ?", [job_id])
    keyring = tmp_path / "coordinator" / "keyring.json"
    assert (epoch, key_id, kek_id) == (1, opened.key_id, FileKeyring(keyring).current)
    assert keyring.stat().st_mode & 0o777 == 0o600


async def test_a_coordinator_without_its_keyring_says_which_key_is_missing(cortex, tmp_path):
    await announce(cortex, "w1", "w2")
    async with cortex.jobs() as stub:
        job_id = await submit(stub, job())
    await cortex.stop("coordinator")
    kept = FileKeyring(tmp_path / "coordinator" / "keyring.json").current
    (tmp_path / "coordinator" / "keyring.json").unlink()
    await cortex.start("coordinator")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers), cortex.jobs() as stub:
        status = await until(stub, job_id, JobPhase.FAILED)
        assert f"key-encryption key '{kept}' is not in" in (status.error or "")
        # Only that job: new ones get keys under the new one.
        await until(stub, await submit(stub, job()), JobPhase.COMPLETED)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32)])
async def test_a_worker_without_a_sealing_key_is_refused(cortex, public):
    async with open_channel(cortex.coordinator, cortex.tls_of(Role.WORKER, "w1"), Role.COORDINATOR) as channel:
        stub = coordinator_pb2_grpc.AssignmentServiceStub(channel)
        call = stub.Attend(pb.AttendRequest(worker="w1", incarnation="one", slots=1, sealing_key=public))
        with pytest.raises(grpc.aio.AioRpcError, match="sealing") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_worker_that_starts_anew_gets_the_same_key_wrapped_anew(cortex):
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, job(training={"rounds": 4}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=1)
    before = dict(workers[0].keys)
    for worker in workers:
        worker.keys.clear()
        worker.sealing = SealingKey("cortex")
    async with working(*workers), cortex.jobs() as stub:
        await until(stub, job_id, JobPhase.COMPLETED)
    assert workers[0].keys == before
