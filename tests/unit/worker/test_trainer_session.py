"""The trainer child's commands, served in a thread instead of a process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortex_common.clock import SystemClock
from cortex_common.job.parse import parse_job
from cortex_common.tensors import Manifest
from services.worker.link import ChildLink, body_length, decode, encode
from services.worker.shared_arena import SharedArena
from services.worker.trainer.session import Session

JOB: dict[str, Any] = {
    "model": {"input_dim": 64, "hidden_dims": [16], "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test"},
}


class Worker:
    """The worker's end of the line."""

    def __init__(self, connection: socket.socket, folder: Path) -> None:
        self.connection = connection
        self.folder = folder
        self.arenas: list[SharedArena] = []
        self._serial = 0

    def send(self, op: str, *descriptors: int, **body: Any) -> int:
        self._serial += 1
        header, text = encode({"op": op, "id": self._serial, **body})
        socket.send_fds(self.connection, [header], list(descriptors))
        self.connection.sendall(text)
        return self._serial

    def receive(self) -> dict[str, Any]:
        return dict(decode(self._exactly(body_length(self._exactly(4)))))

    def ask(self, op: str, *descriptors: int, **body: Any) -> dict[str, Any]:
        number = self.send(op, *descriptors, **body)
        while "progress" in (answer := self.receive()):
            pass
        assert answer["id"] == number
        return answer

    def prepare(self, with_data: bool = True, **changes: Any) -> dict[str, Any]:
        spec = parse_job({**JOB, **changes}).model_dump(mode="json")
        place = {"seat": 0, "seats": 1, "cache_dir": str(self.folder), "catalogue": None}
        return self.ask("prepare", spec=spec, with_data=with_data, **place)

    def attach(self) -> None:
        manifest = Manifest.from_json(self.prepare(with_data=False)["done"]["manifest"].encode())
        self.arenas = [SharedArena.create(manifest), SharedArena.create(manifest)]
        fds = [each.descriptor for each in self.arenas]
        assert self.ask("arenas", *fds, manifest=manifest.to_json().decode())["done"] == {}

    def _exactly(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            parts += self.connection.recv(count - len(parts))
        return parts


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    ours, theirs = socket.socketpair()
    session = Session(ChildLink(theirs), "cpu", SystemClock())
    thread = threading.Thread(target=session.serve)
    thread.start()
    yield Worker(ours, tmp_path)
    ours.close()
    thread.join(10)
    assert not thread.is_alive(), "the child must end with its worker"
    theirs.close()


def test_a_job_from_its_first_version_to_its_score(worker: Worker) -> None:
    worker.attach()
    assert worker.ask("initialise")["done"]["parameters"] == 16 * 65 + 10 * 17
    base, result = (each.arena for each in worker.arenas)
    assert np.any(result.values)
    base.values[:] = result.values
    done = worker.ask("train", round=1, seat=0, seats=1)["done"]
    assert (done["steps"], done["partition_examples"]) == (45, 1438)
    assert not np.array_equal(base.values, result.values)
    (score,) = worker.ask("evaluate", slices=[0], of=1)["done"]["slices"]
    assert score["examples"] == 359


def test_a_cancelled_training_ends_and_the_next_command_is_served(worker: Worker) -> None:
    worker.attach()
    worker.prepare(training={"local_seconds": 3600.0})
    number = worker.send("train", round=1, seat=0, seats=1)
    assert "progress" in worker.receive()
    header, body = encode({"op": "cancel", "id": number})
    worker.connection.sendall(header + body)
    while "progress" in (answer := worker.receive()):
        pass
    assert answer == {"id": number, "cancelled": True}
    assert "done" in worker.ask("evaluate", slices=[0], of=4)


def test_a_late_cancel_does_no_harm(worker: Worker) -> None:
    header, body = encode({"op": "cancel", "id": 77})
    worker.connection.sendall(header + body)
    worker.attach()


def test_commands_out_of_order_are_not_the_jobs_fault(worker: Worker) -> None:
    assert worker.ask("train", round=1, seat=0, seats=1) == {
        "id": 1,
        "failed": "the trainer has no job yet",
        "permanent": False,
    }
    worker.prepare(with_data=False)
    answer = worker.ask("initialise")
    assert (answer["failed"], answer["permanent"]) == ("the trainer has no arenas yet", False)


@pytest.mark.parametrize(
    ("changes", "reason", "permanent"),
    [
        ({"data": {"train": "cats"}}, "data.train: dataset 'cats' is not on this node", False),
        ({"model": {"input_dim": 63, "output_dim": 10}}, "data.train: digits has inputs of 64 values", True),
        (
            {"model": {**JOB["model"], "freeze": ["nothing"]}},
            "model.freeze: 'nothing' fits no parameter; there are: hidden_1.weight",
            True,
        ),
    ],
)
def test_a_job_that_cannot_be_prepared_is_refused_with_the_reason(
    worker: Worker, changes: dict[str, Any], reason: str, permanent: bool
) -> None:
    answer = worker.prepare(**changes)
    assert answer["failed"].startswith(reason)
    assert answer["permanent"] == permanent
    assert "done" in worker.prepare()


def test_weights_to_start_from_are_read_from_a_file(worker: Worker, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = {"output.bias": np.full(10, 3.0, np.float32)}
    save_file(weights, tmp_path / "old.safetensors")
    worker.attach()
    worker.prepare(model={**JOB["model"], "init_from": str(tmp_path / "old.safetensors")})
    worker.ask("initialise")
    assert worker.arenas[1].arena.values[-10:].tolist() == [3.0] * 10
    worker.prepare(model={**JOB["model"], "init_from": str(tmp_path / "missing.safetensors")})
    answer = worker.ask("initialise")
    assert "there is no such file" in answer["failed"]
    assert not answer["permanent"], "another node may have it"


def test_an_error_in_user_code_marks_the_trainer_as_unsound(worker: Worker) -> None:
    answer = worker.ask("dance")
    assert answer["failed"].startswith("KeyError")
    assert not answer["permanent"]
    assert answer["tainted"]


def test_a_node_without_memory_is_not_the_jobs_fault(worker: Worker) -> None:
    """PyTorch's CPU allocator says so with a plain RuntimeError, as CUDA does of a broken device."""
    answer = worker.prepare(model={"input_dim": 64, "hidden_dims": [1 << 23, 1 << 23], "output_dim": 10})
    assert "allocate" in answer["failed"]
    assert not answer["permanent"]
    assert answer["tainted"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer_options": {"betas": ["a", "b"]}}, "adam refuses its options"),
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": True}}, "sgd refuses its options"),
        ({"optimizer": "sgd", "learning_rate": 1e30}, "training diverged"),
    ],
)
def test_a_mistake_in_the_job_is_permanent(worker: Worker, changes: dict[str, Any], reason: str) -> None:
    worker.attach()
    worker.ask("initialise")
    base, result = (each.arena for each in worker.arenas)
    base.values[:] = result.values
    worker.prepare(training=changes)
    answer = worker.ask("train", round=1, seat=0, seats=1)
    assert reason in answer["failed"]
    assert answer["permanent"]
