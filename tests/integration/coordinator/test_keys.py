"""Data keys of real jobs: wrapped to members, wrapped at rest."""

from __future__ import annotations

import asyncio
import json
import sqlite3

import grpc
import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import CorruptError, PreconditionError, UnavailableError
from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from cortex_common.job.wire import status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.security.keyring import FileKeyring
from cortex_common.security.sealing import SealingKey
from tests.integration.coordinator.harness import ScriptedWorker, hold_at, let_go, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until


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
    assert (epoch, key_id, kek_id) == (1, opened.key_id, FileKeyring(keyring, SystemClock()).current)
    assert keyring.stat().st_mode & 0o777 == 0o600


async def test_a_coordinator_without_its_keyring_says_which_key_is_missing(cortex, tmp_path):
    await announce(cortex, "w1", "w2")
    async with cortex.jobs() as stub:
        job_id = await submit(stub, job())
    await cortex.stop("coordinator")
    kept = FileKeyring(tmp_path / "coordinator" / "keyring.json", SystemClock()).current
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
        hold_at(2, *workers)
        job_id = await submit(stub, job(training={"rounds": 4}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
    let_go(*workers)
    before = dict(workers[0].keys)
    for worker in workers:
        worker.keys.clear()
        worker.sealing = SealingKey("cortex")
    async with working(*workers), cortex.jobs() as stub:
        await until(stub, job_id, JobPhase.COMPLETED)
    assert workers[0].keys == before


async def epochs_of(cortex, job_id=""):
    async with open_channel(cortex.coordinator, cortex.tls_of(Role.OPERATOR, "ann"), Role.COORDINATOR) as channel:
        answer = await coordinator_pb2_grpc.KeyServiceStub(channel).ListKeys(pb.ListKeysRequest(job_id=job_id))
    return list(answer.epochs)


async def rotate(cortex, job_id):
    async with open_channel(cortex.coordinator, cortex.tls_of(Role.OPERATOR, "ann"), Role.COORDINATOR) as channel:
        with calling("coordinator"):
            await coordinator_pb2_grpc.KeyServiceStub(channel).RotateDataKey(pb.RotateDataKeyRequest(job_id=job_id))


async def model_of(stub, job_id, number=None):
    return b"".join(
        [answer.data async for answer in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id, round=number))]
    )


@pytest.mark.parametrize("topology", ["flat", "regional"])
async def test_keys_rotate_in_every_round_and_no_round_is_lost(cortex, tmp_path, topology):
    """Delta downloads and an optimiser's state are read across epochs; keys that nothing needs any more are erased."""
    cortex.coordinator_settings = {"data_key_rounds": 1}
    await cortex.stop("coordinator")
    await cortex.start("coordinator")
    if topology == "regional":
        await cortex.start("aggregator-us", region="us")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    spec = job(
        training={"rounds": 6, "checkpoint": {"keep": 2}},
        aggregation={"topology": topology, "strategy": "fedavgm"},
        compression={"download": {"codec": "int8", "resync_every": 4}},
    )
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, spec)
        status = await until(stub, job_id, JobPhase.COMPLETED)
        assert [(report.round, report.attempt, report.accepted) for report in status.history] == [
            (number, 1, 2) for number in range(1, 7)
        ]
        epochs = await epochs_of(cortex, job_id)
        assert [(each.epoch, each.from_round) for each in epochs] == [(number + 1, number) for number in range(7)]
        assert {each.reason for each in epochs[1:]} == {"used for 1 rounds"}
        await eventually_erased(cortex, job_id, keep={6, 7})
        for number in (5, 6):
            assert await model_of(stub, job_id, number)
    assert len({key.key for key in workers[0].keys.values()}) == 7
    needles = [each for key in workers[0].keys.values() for each in (key.key, key.key.hex().encode())]
    assert files_with(tmp_path, needles) == []


async def eventually_erased(cortex, job_id, keep):
    async with asyncio.timeout(20):
        while {each.epoch for each in await epochs_of(cortex, job_id) if each.state != pb.KEY_STATE_ERASED} != keep:  # noqa: ASYNC110 - it has to be asked for
            await asyncio.sleep(0.05)


async def test_a_rotation_asked_for_begins_with_the_next_round_also_after_a_restart(cortex):
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers):
        async with cortex.jobs() as stub:
            hold_at(1, *workers)
            job_id = await submit(stub, job(training={"rounds": 5}))
            await until(stub, job_id, JobPhase.TRAINING, round_number=1)
            await rotate(cortex, job_id)
            await rotate(cortex, job_id)
        await cortex.stop("coordinator")
        await cortex.start("coordinator")
        let_go(*workers)
        async with cortex.jobs() as stub:
            status = await until(stub, job_id, JobPhase.COMPLETED)
            with pytest.raises(PreconditionError, match="completed"):
                await rotate(cortex, job_id)
    assert [report.accepted for report in status.history] == [2] * 5
    assert all(report.attempt == 1 for report in status.history)
    epochs = await epochs_of(cortex, job_id)
    assert [each.reason for each in epochs] == ["job submitted", "asked for by ann"]
    assert len(workers[0].keys) == 2


async def test_who_leaves_a_job_is_not_given_its_next_key(cortex):
    await announce(cortex, "w1", "w2", "w3")
    stays = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    leaves = ScriptedWorker(cortex, "w3", 5.0)
    async with cortex.jobs() as stub:
        async with working(*stays):
            async with working(leaves):
                hold_at(2, *stays, leaves)
                job_id = await submit(stub, job(training={"rounds": 8}, placement={"workers": 3, "min_workers": 2}))
                await until(stub, job_id, JobPhase.TRAINING, round_number=2)
            let_go(*stays)
            status = await until(stub, job_id, JobPhase.COMPLETED)
        assert [report.round for report in status.history] == list(range(1, 9))
    first, *later = await epochs_of(cortex, job_id)
    assert [each.reason for each in later] == ["worker w3 left"]
    assert set(leaves.keys) == {first.key_id}
    assert set(stays[0].keys) == {each.key_id for each in (first, *later)}


async def test_rotations_are_in_the_audit_log(cortex, tmp_path):
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers), cortex.jobs() as stub:
        hold_at(1, *workers)
        job_id = await submit(stub, job(training={"rounds": 4, "checkpoint": {"keep": 1}}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=1)
        await rotate(cortex, job_id)
        let_go(*workers)
        await until(stub, job_id, JobPhase.COMPLETED)
        await eventually_erased(cortex, job_id, keep={2})
    await cortex.stop("coordinator")
    (segment,) = (tmp_path / "coordinator" / "audit").glob("audit-*.jsonl")
    records = [json.loads(line) for line in segment.read_text().splitlines()]
    about = {
        (each["what"], each["about"].partition(" key_id")[0]): each
        for each in records
        if job_id in each.get("about", "")
    }
    assert about["/cortex.v1.KeyService/RotateDataKey", f"job_id={job_id}"]["who"].endswith("operator/ann")
    rotated = about["data key made", f"job_id={job_id} epoch=2"]
    assert rotated["who"].endswith("coordinator/coordinator-1")
    assert rotated["reason"] == "asked for by ann"
    assert ("data key erased", f"job_id={job_id} epoch=1") in about


async def test_the_key_encryption_key_is_replaced_in_the_middle_of_a_job_and_kill_and_restart_find_it(cortex, tmp_path):
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    keyring = tmp_path / "coordinator" / "keyring.json"
    first = FileKeyring(keyring, SystemClock()).current
    async with working(*workers):
        async with cortex.jobs() as stub:
            hold_at(1, *workers)
            job_id = await submit(stub, job(training={"rounds": 6}))
            await until(stub, job_id, JobPhase.TRAINING, round_number=1)
        async with open_channel(cortex.coordinator, cortex.tls_of(Role.OPERATOR, "ann"), Role.COORDINATOR) as channel:
            request = pb.RotateKeyEncryptionKeyRequest()
            answer = await coordinator_pb2_grpc.KeyServiceStub(channel).RotateKeyEncryptionKey(request)
        assert answer.rewrapped == 1
        assert FileKeyring(keyring, SystemClock()).ids == (answer.kek_id,)
        await cortex.stop("coordinator")
        await cortex.start("coordinator")
        let_go(*workers)
        async with cortex.jobs() as stub:
            status = await until(stub, job_id, JobPhase.COMPLETED)
            assert await model_of(stub, job_id, 6)
    assert [(report.attempt, report.accepted) for report in status.history] == [(1, 2)] * 6
    (epoch,) = await epochs_of(cortex, job_id)
    assert epoch.kek_id == answer.kek_id != first


async def test_data_keys_and_their_key_encryption_key_age_within_one_job(cortex):
    cortex.coordinator_settings = {"data_key_age_s": 0.3, "kek_age_s": 0.4}
    await cortex.stop("coordinator")
    await cortex.start("coordinator")
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    keks, data_keys = set(), set()
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, job(training={"rounds": 400}))
        async with asyncio.timeout(30):
            while len(keks) < 4 or len(data_keys) < 4:
                epochs = await epochs_of(cortex, job_id)
                keks |= {each.kek_id for each in epochs if each.state != pb.KEY_STATE_ERASED}
                data_keys |= {each.key_id for each in epochs}
                await asyncio.sleep(0.02)
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        status = await until(stub, job_id, JobPhase.CANCELLED)
    assert all((report.attempt, report.accepted) == (1, 2) for report in status.history)
    assert any("s old" in each.reason for each in epochs)


class Away(FileKeyring):
    """A key-encryption key that is somewhere else for now."""

    def wrap(self, secret, context):
        raise UnavailableError("token 'x' does not answer")


def take_away(cortex):
    keyring_of(cortex).__class__ = Away


def bring_back(cortex):
    keyring_of(cortex).__class__ = FileKeyring


def keyring_of(cortex):
    return cortex.running.coordinator._keys._keyring


async def events_of(stub, job_id, name):
    events = [each.event async for each in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))]
    return [event.message for event in events if event.name == name]


async def test_a_data_key_that_is_only_old_goes_on_while_the_key_encryption_key_is_away(cortex):
    cortex.coordinator_settings = {"data_key_rounds": 1}
    await cortex.stop("coordinator")
    await cortex.start("coordinator")
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers), cortex.jobs() as stub:
        hold_at(2, *workers)
        job_id = await submit(stub, job(training={"rounds": 400}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        assert len(await epochs_of(cortex, job_id)) == 3
        take_away(cortex)
        let_go(*workers)
        await until(stub, job_id, JobPhase.TRAINING, round_number=8)
        assert len(await epochs_of(cortex, job_id)) == 3
        (kept,) = await events_of(stub, job_id, "data_key_kept")
        assert kept == ("epoch 3 goes on, though used for 1 rounds; the key-encryption key: token 'x' does not answer")
        bring_back(cortex)
        await until_epochs(cortex, job_id, 5)
        await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        status = await until(stub, job_id, JobPhase.CANCELLED)
        fourth = (await epochs_of(cortex, job_id))[3]
    assert fourth.from_round > 8
    assert fourth.reason == f"used for {fourth.from_round - 2} rounds"
    assert all((report.attempt, report.accepted) == (1, 2) for report in status.history)


async def test_a_round_that_needs_a_new_data_key_waits_for_the_key_encryption_key_and_says_so(cortex):
    await announce(cortex, "w1", "w2")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    async with working(*workers), cortex.jobs() as stub:
        hold_at(2, *workers)
        job_id = await submit(stub, job(training={"rounds": 4}))
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        take_away(cortex)
        await rotate(cortex, job_id)
        let_go(*workers)
        waits = await until_waiting(stub, job_id, "key-encryption key")
        assert waits.waiting_for == (
            "the key-encryption key: token 'x' does not answer; a new data key is needed: asked for by ann"
        )
        assert [report.round for report in waits.history] == [1, 2], "the round before is stored"
        with pytest.raises(UnavailableError, match="does not answer"):
            await submit(stub, job())
        await until_waiting(stub, job_id, "key-encryption key", answers=3)
        bring_back(cortex)
        status = await until(stub, job_id, JobPhase.COMPLETED)
    assert [(report.round, report.attempt, report.accepted) for report in status.history] == [
        (number, 1, 2) for number in range(1, 5)
    ]
    assert [(each.from_round, each.reason) for each in await epochs_of(cortex, job_id)] == [
        (0, "job submitted"),
        (3, "asked for by ann"),
    ]


async def until_epochs(cortex, job_id, count):
    async with asyncio.timeout(20):
        while len(await epochs_of(cortex, job_id)) < count:  # noqa: ASYNC110 - it has to be asked for
            await asyncio.sleep(0.02)


async def until_waiting(stub, job_id, what, answers=1):
    """The status once the job has waited for this in so many answers, which come once a second."""
    async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
        status = status_from_proto(answer.job)
        assert not status.status.is_terminal, status
        answers -= what in (status.waiting_for or "")
        if not answers:
            return status
    raise AssertionError(f"the job never waited for {what}")


def sealed_under(folder):
    """Key ids in the facts of all stored versions."""
    return {key_id for path in facts_in(folder) for key_id in key_ids_in(path)}


def written_under(folder, key_id):
    """Facts of the versions that are wholly under a key, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in facts_in(folder) if key_ids_in(path) == {key_id}}


def facts_in(folder):
    return list(folder.glob("aggregator*/versions/*/*.json"))


def key_ids_in(path):
    facts = json.loads(path.read_text())
    parts = [facts["header"], *(facts[name]["header"] for name in ("state", "delta") if facts[name])]
    return {part["key_id"] for part in parts}


async def reseal(cortex, job_id):
    async with open_channel(cortex.coordinator, cortex.tls_of(Role.OPERATOR, "ann"), Role.COORDINATOR) as channel:
        request = pb.RotateDataKeyRequest(job_id=job_id, reseal=True)
        with calling("coordinator"):
            return (await coordinator_pb2_grpc.KeyServiceStub(channel).RotateDataKey(request)).resealed


@pytest.mark.parametrize("topology", ["flat", "regional"])
async def test_what_is_stored_of_a_job_comes_under_its_new_key_while_it_runs_and_when_it_has_ended(
    cortex, tmp_path, topology
):
    if topology == "regional":
        await cortex.start("aggregator-us", region="us")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    spec = job(
        training={"rounds": 8, "checkpoint": {"keep": 8}},
        aggregation={"topology": topology, "strategy": "fedavgm"},
        compression={"download": {"codec": "int8", "resync_every": 4}},
    )
    async with working(*workers), cortex.jobs() as stub:
        hold_at(3, *workers)
        job_id = await submit(stub, spec)
        await until(stub, job_id, JobPhase.TRAINING, round_number=3)
        before = await model_of(stub, job_id, 1)
        assert await reseal(cortex, job_id) == 0
        let_go(*workers)
        status = await until(stub, job_id, JobPhase.COMPLETED)
        assert [(report.attempt, report.accepted) for report in status.history] == [(1, 2)] * 8
        await eventually_erased(cortex, job_id, keep={2})
        _, second = await epochs_of(cortex, job_id)
        assert sealed_under(tmp_path) == {second.key_id}
        assert await model_of(stub, job_id, 1) == before

        assert await reseal_at_last(cortex, job_id) > 0
        *_, third = await epochs_of(cortex, job_id)
        assert sealed_under(tmp_path) == {third.key_id}
        await eventually_erased(cortex, job_id, keep={3})
        assert await model_of(stub, job_id, 1) == before
        for number in range(2, 9):
            assert await model_of(stub, job_id, number)


async def test_resealing_an_ended_job_goes_on_where_it_was_broken_off(cortex, tmp_path):
    await cortex.start("aggregator-us", region="us")
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0, region="us")
    await announce(cortex, "w1", "w2")
    spec = job(training={"rounds": 3, "checkpoint": {"keep": 3}}, aggregation={"topology": "regional"})
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, spec)
        await until(stub, job_id, JobPhase.COMPLETED)
        before = await model_of(stub, job_id, 1)
    assert await reseal_at_last(cortex, job_id) > 0

    await cortex.stop("aggregator-us")
    with pytest.raises(UnavailableError):
        await reseal(cortex, job_id)
    begun = await epochs_of(cortex, job_id)
    assert len(begun) == 3, "asked for when all was done, it is another key"
    done = written_under(tmp_path, begun[-1].key_id)
    assert done

    await cortex.stop("coordinator")
    await cortex.start("aggregator-us", region="us")
    await cortex.start("coordinator")
    assert await reseal(cortex, job_id) > 0
    assert [each.key_id for each in await epochs_of(cortex, job_id)] == [each.key_id for each in begun]
    assert sealed_under(tmp_path) == {begun[-1].key_id}
    assert done.items() < written_under(tmp_path, begun[-1].key_id).items(), "what was done is passed over"
    await eventually_erased(cortex, job_id, keep={3})
    async with cortex.jobs() as stub:
        assert await model_of(stub, job_id, 1) == before


async def test_a_job_of_which_something_does_not_open_keeps_its_keys(cortex, tmp_path):
    workers = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    await announce(cortex, "w1", "w2")
    async with working(*workers), cortex.jobs() as stub:
        job_id = await submit(stub, job(training={"rounds": 3, "checkpoint": {"keep": 3}}))
        await until(stub, job_id, JobPhase.COMPLETED)
        third = await model_of(stub, job_id, 3)
        (blob,) = (tmp_path / "aggregator" / "versions" / job_id).glob("2-*.blob")
        spoilt = bytearray(blob.read_bytes())
        spoilt[5] ^= 1
        blob.write_bytes(spoilt)
        with pytest.raises(CorruptError, match="round 2"):
            await reseal_at_last(cortex, job_id)
        assert await model_of(stub, job_id, 3) == third
        assert all(each.state != pb.KEY_STATE_ERASED for each in await epochs_of(cortex, job_id))


async def reseal_at_last(cortex, job_id):
    """Reseal, as soon as the job has been cleaned up."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await reseal(cortex, job_id)
            except PreconditionError:
                await asyncio.sleep(0.05)
