"""A slot gets a trainer again after it could not be given one."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from services.worker.failures import TrainerEndedError
from services.worker.slots import TrainerSlot
from services.worker.trainer_process import TrainerProcess
from services.worker.trainer_thread import TrainerThread


def full() -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("kind", ["process", "thread"])
async def test_a_worker_that_was_out_of_descriptors_for_a_while_trains_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start() -> Any:
        if kind == "process":
            return await TrainerProcess.start(1, "cpu")
        return await TrainerThread.start("cpu", lambda _spec, _message: None)  # type: ignore[arg-type,return-value]

    slot = TrainerSlot(start)
    with monkeypatch.context() as exhausted:
        exhausted.setattr(socket, "socketpair", full)
        for _ in range(2):
            with pytest.raises(TrainerEndedError, match=r"the trainer cannot be started: .*Too many open files"):
                await slot.trainer()
    trainer = await slot.trainer()
    assert trainer.is_alive
    await slot.clear()
