"""Four processes of torch.distributed over Gloo and nothing else: what the algorithm alone costs.

Start-up, and the evaluation of the model after each round, are not counted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peer_task import STEP, Evaluation, Task, Trainer, arrays_of

_OUTER_RATE, _OUTER_MOMENTUM = 0.7, 0.9
_DDP_STEPS_A_ROUND = 100


class Stopwatch:
    """Time since the start, but for the time in which it was stopped."""

    def __init__(self) -> None:
        self._stopped_s = 0.0

    def without(self, work: Callable[[], float]) -> float:
        """Do something that nobody's time is counted for; the others wait."""
        dist.barrier()
        since = time.monotonic()
        result = work()
        dist.barrier()
        self._stopped_s += time.monotonic() - since
        return result

    def now(self) -> float:
        """Seconds on the machine's clock, less the stops."""
        return time.monotonic() - self._stopped_s


def allreduce(task: Task, rank: int) -> None:
    """Sum vectors as long as the model, one after another."""
    vector = torch.zeros(sum(torch.Size(shape).numel() for shape in task.shapes))
    dist.barrier()
    if rank == 0:
        task.say(0, vector[-1:].numpy())
    for number in range(task.rounds):
        change = torch.full_like(vector, (rank + 1) * STEP)
        dist.barrier()
        since = time.monotonic()
        dist.all_reduce(change)
        dist.barrier()
        seconds = time.monotonic() - since
        vector += change / task.workers
        if rank == 0:
            task.say(number + 1, vector[-1:].numpy(), seconds=seconds)


def train(task: Task, rank: int) -> None:
    """DDP, FedAvg or DiLoCo until the target is reached."""
    trainer, watch = Trainer(task, rank), Stopwatch()
    round_of = {"ddp": _ddp, "fedavg": _fedavg, "diloco": _diloco}[task.algorithm](task, trainer)
    evaluation = Evaluation(task) if rank == 0 else None

    def accuracy() -> float:
        found = torch.tensor([evaluation.of(arrays_of(trainer.model)) if evaluation else 0.0])
        dist.broadcast(found, 0)
        return float(found)

    watch.without(accuracy)
    start = watch.now()
    if rank == 0:
        task.say(0, arrays_of(trainer.model)[-1])
    for number in range(task.rounds):
        round_of()
        at = watch.now() - start
        found = watch.without(accuracy)
        if rank == 0:
            task.say(number + 1, arrays_of(trainer.model)[-1], found, seconds=at)
        if found >= task.target:
            break


def _ddp(task: Task, trainer: Trainer) -> Callable[[], None]:
    model = torch.nn.parallel.DistributedDataParallel(trainer.model)
    optimizer = trainer.optimizer()
    return lambda: trainer.train(_DDP_STEPS_A_ROUND, optimizer, model)


def _fedavg(task: Task, trainer: Trainer) -> Callable[[], None]:
    def step() -> None:
        trainer.train(task.every or trainer.epoch_steps())
        for value in trainer.model.state_dict().values():
            dist.all_reduce(value)
            value /= task.workers

    return step


def _diloco(task: Task, trainer: Trainer) -> Callable[[], None]:
    values = list(trainer.model.state_dict().values())
    kept = [value.clone() for value in values]
    moments = [torch.zeros_like(value) for value in values]

    def step() -> None:
        trainer.train(task.every)
        for value, before, moment in zip(values, kept, moments, strict=True):
            change = value - before
            dist.all_reduce(change)
            change /= task.workers
            moment.mul_(_OUTER_MOMENTUM).add_(change)
            before += _OUTER_RATE * (change + _OUTER_MOMENTUM * moment)
            value.copy_(before)

    return step


def main() -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    task: Any = Task.load()
    work = allreduce if task.algorithm == "allreduce" else train
    work(task, dist.get_rank())
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # PyTorch's own end aborts now and then: a thread of Gloo's is still there


if __name__ == "__main__":
    main()
