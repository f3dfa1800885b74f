"""Trainers that are copies of one process: ready before a job, fresh for each, and what a kill -9 of either does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from cortex_common.ids import JobId
from cortex_common.tensors import Manifest, model_sha256
from services.worker.failures import TrainerEndedError
from services.worker.fork_server import ForkServer
from services.worker.shared_arena import SharedArena
from services.worker.slots import TrainerSlot
from services.worker.trainer_line import Trainer
from services.worker.trainer_process import TrainerProcess, fork_server
from tests.integration.worker.harness import Network, digits_job

pytestmark = pytest.mark.asyncio(loop_scope="module")
_SPEC = digits_job().model_dump(mode="json")


@pytest_asyncio.fixture(loop_scope="module")
async def server() -> AsyncIterator[ForkServer]:
    made = fork_server(2, "cpu")
    yield made
    await made.close()


async def prepare(trainer: Trainer, network: Network, *, with_data: bool = False) -> str:
    """Have it build a network; its layout."""
    places = {"cache_dir": str(network.folder), "catalogue": None, "with_data": with_data}
    answer = await trainer.ask("prepare", {"spec": _SPEC, "seat": 0, "seats": 1, **places})
    return str(answer["manifest"])


async def idle_slot(network: Network) -> TrainerSlot:
    """The slot of the only worker, once it has no job."""
    supervisor = network.main.supervisor
    slots = [slot for slot, _ in supervisor._jobs.values()]
    trainers = [await slot.trainer() for slot in slots]
    await network.coordinator.assign("w1")
    for trainer in trainers:
        await trainer.ended
    [slot] = slots or supervisor._free
    return slot


def parent_of(trainer: TrainerProcess) -> psutil.Process:
    parent = psutil.Process(trainer.pid).parent()
    assert parent is not None
    return parent


async def test_a_job_gets_the_trainer_that_was_ready_before_it(network: Network) -> None:
    supervisor = network.main.supervisor
    [free] = supervisor._free
    spare = await free.trainer()
    await spare.ready.wait()
    train = await network.next_round(digits_job())
    await network.coordinator.report_on(train, "trained")
    slot, _ = supervisor._jobs[JobId(network.job_id)]
    assert await slot.trainer() is spare
    await network.coordinator.assign("w1")
    await spare.ended
    assert (await slot.trainer()).pid != spare.pid, "fresh for each job"


async def test_a_killed_spare_is_replaced_before_the_job_notices(network: Network) -> None:
    spare = await (await idle_slot(network)).trainer()
    os.kill(spare.pid, signal.SIGKILL)
    assert "SIGKILL" in await spare.ended
    train = await network.next_round(digits_job())
    report = await network.coordinator.report_on(train, "trained")
    assert report.trained.steps == 45


async def test_a_killed_server_takes_no_trainer_with_it_and_the_next_one_has_another(
    server: ForkServer, network: Network
) -> None:
    first = await TrainerProcess.fork(server)
    layout = await prepare(first, network)
    killed = parent_of(first)
    os.kill(killed.pid, signal.SIGKILL)
    assert await prepare(first, network) == layout
    second = await another(server)
    assert parent_of(second).pid != killed.pid
    assert await prepare(second, network) == layout
    os.kill(first.pid, signal.SIGKILL)
    assert "nobody knows" in await first.ended
    await second.stop()


async def another(server: ForkServer) -> TrainerProcess:
    """A trainer, from the server's successor if it has just gone."""
    try:
        return await TrainerProcess.fork(server)
    except TrainerEndedError:
        return await TrainerProcess.fork(server)


async def test_a_trainer_sees_neither_the_line_of_another_nor_that_of_the_server(server: ForkServer) -> None:
    first, second = await TrainerProcess.fork(server), await TrainerProcess.fork(server)
    await first.ready.wait()
    await second.ready.wait()
    descriptors = [_descriptors(each.pid) for each in (first, second)]
    sockets = [{it for it in each if it.startswith("socket:")} for each in descriptors]
    assert [len(each) for each in sockets] == [1, 1]
    assert not sockets[0] & sockets[1]
    assert not any("pidfd" in it or "eventpoll" in it for each in descriptors for it in each)
    await first.stop()
    await second.stop()


async def test_a_trainer_that_is_stopped_leaves_no_zombie_and_one_whose_worker_is_gone_ends(server: ForkServer) -> None:
    stopped, left = await TrainerProcess.fork(server), await TrainerProcess.fork(server)
    parent, process = parent_of(stopped), psutil.Process(left.pid)
    await stopped.stop()
    assert [each.pid for each in parent.children()] == [left.pid]
    await left.ready.wait()
    left._connection.shutdown(2)
    assert "exit code 0" in await left.ended
    assert not process.is_running()
    await server.close()
    assert not parent.is_running()


async def test_giving_up_waiting_for_a_trainer_leaves_none(server: ForkServer) -> None:
    starting = asyncio.create_task(TrainerProcess.fork(server))
    first = await TrainerProcess.fork(server)
    starting.cancel()
    await asyncio.wait((starting,))
    second = await TrainerProcess.fork(server)
    children = parent_of(second).children()
    assert {first.pid, second.pid} <= {each.pid for each in children}
    others = [each for each in children if each.pid not in {first.pid, second.pid}]
    assert not psutil.wait_procs(others, timeout=30)[1]
    await first.stop()
    await second.stop()


async def test_a_server_that_cannot_start_says_why() -> None:
    server = ForkServer(("-c", "raise SystemExit('no torch here')"), {})
    with pytest.raises(TrainerEndedError, match="no torch here"):
        await TrainerProcess.fork(server)


async def test_a_copy_trains_the_numbers_that_a_new_process_trains(network: Network) -> None:
    one = fork_server(1, "cpu")
    try:
        forked, new = await TrainerProcess.fork(one), await TrainerProcess.start(1, "cpu")
        versions = [await trained(each, network) for each in (forked, new)]
        assert versions[0] == versions[1]
    finally:
        await one.close()


async def test_a_copy_has_the_threads_of_its_worker(server: ForkServer) -> None:
    trainer = await TrainerProcess.fork(server)
    assert psutil.Process(trainer.pid).environ()["OMP_NUM_THREADS"] == "2"
    await trainer.stop()


async def test_without_the_setting_each_trainer_is_a_new_process_of_the_worker(network: Network) -> None:
    worker = await network.worker("w2", fork_trainers=False)
    [free] = worker.supervisor._free
    trainer = await free.trainer()
    assert isinstance(trainer, TrainerProcess)
    assert parent_of(trainer).pid == os.getpid()


async def trained(trainer: Trainer, network: Network) -> str:
    """Train the first version of the network in it, and end it; the digest of what came out."""
    manifest = Manifest.from_json((await prepare(trainer, network, with_data=True)).encode())
    base, result = SharedArena.create(manifest), SharedArena.create(manifest)
    shared = (base.descriptor, result.descriptor)
    await trainer.ask("arenas", {"manifest": manifest.to_json().decode()}, shared)
    await trainer.ask("initialise", {})
    np.copyto(base.arena.values, result.arena.values)
    answer = await trainer.ask("train", {"round": 1, "seat": 0, "seats": 1})
    assert answer["steps"] == 45
    digest = model_sha256(manifest, result.arena)
    assert digest != model_sha256(manifest, base.arena)
    await trainer.stop()
    return digest


def _descriptors(pid: int) -> list[str]:
    return [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
