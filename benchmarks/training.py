"""Training on Fashion-MNIST until it is good enough: the same examples for everybody, wall time from the submission."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.network import BenchmarkError, RunningNetwork
from cortex.client import Client
from cortex_common.data import fashion
from cortex_common.data.loading import fetch, load
from cortex_common.data.partition import Partition, partition
from cortex_common.job.status import JobPhase, JobStatus

LAYERS = (784, 512, 256, 10)
TARGETS = (0.80, 0.85, 0.87)
_BATCH = 32
_DILOCO_STEPS = 100


class Algorithm(StrEnum):
    """How weights of the workers come together."""

    FEDAVG = "fedavg"
    """Means after each epoch."""
    DILOCO = "diloco"
    """After every 100 steps, an outer Nesterov step of 0.7 with momentum 0.9."""
    DDP = "ddp"
    """Gradients after every step: only where nothing but PyTorch is between the workers."""


@dataclass(frozen=True, slots=True)
class Point:
    """An accuracy, and how many seconds after the submission it was known."""

    at_s: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One training.

    Attributes:
        points: After each round.
        cpu_s: CPU-seconds of all processes, from the submission to the end.
    """

    points: list[Point]
    cpu_s: float
    others_cores: float

    def seconds_to(self, target: float) -> float | None:
        """When an accuracy was first reached."""
        return next((point.at_s for point in self.points if point.accuracy >= target), None)


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """What everybody is given: 4 workers by default, Adam made anew each round, batches of 32, one thread each."""

    data: Path
    algorithm: Algorithm = Algorithm.FEDAVG
    workers: int = 4
    codec: str = "none"

    @property
    def rounds(self) -> int:
        """At most."""
        return 12 if self.algorithm is Algorithm.FEDAVG else 60

    @property
    def learning_rate(self) -> float:
        """Of Adam; for DiLoCo that of its paper: with 0.001, made anew each round, its outer momentum runs away."""
        return 4e-4 if self.algorithm is Algorithm.DILOCO else 1e-3

    def is_over(self, accuracies: Sequence[float]) -> bool:
        """Whether the best target is reached, or nothing more comes."""
        return len(accuracies) >= self.rounds or max(accuracies, default=0.0) >= TARGETS[-1]

    def peer_fields(self) -> Mapping[str, Any]:
        """As a task file for `peers/apps` says it."""
        from benchmarks.peers.tasks import perceptron_shapes

        return {
            "shapes": perceptron_shapes(LAYERS),
            "rounds": self.rounds,
            "workers": self.workers,
            "data": str(self.data),
            "batch_size": _BATCH,
            "learning_rate": self.learning_rate,
            "every": _DILOCO_STEPS if self.algorithm is Algorithm.DILOCO else 0,
            "algorithm": self.algorithm.value,
            "target": TARGETS[-1],
        }

    def job(self) -> Mapping[str, Any]:
        """As a Cortex job file says it."""
        is_diloco = self.algorithm is Algorithm.DILOCO
        steps = {"local_steps": _DILOCO_STEPS} if is_diloco else {"local_epochs": 1}
        return {
            "name": f"bench-fashion-{self.algorithm}",
            "model": {
                "kind": "mlp",
                "input_dim": LAYERS[0],
                "hidden_dims": list(LAYERS[1:-1]),
                "output_dim": LAYERS[-1],
            },
            "data": {"train": "fashion-mnist", "test": "fashion-mnist-test", "partition": {"scheme": "iid", "seed": 0}},
            "training": {
                "optimizer": "adam",
                "learning_rate": self.learning_rate,
                "batch_size": _BATCH,
                "rounds": self.rounds,
                "early_stopping": {"metric": "test_accuracy", "patience": self.rounds, "target": TARGETS[-1]},
                "seed": 0,
                **steps,
            },
            "aggregation": {"strategy": self.algorithm.value},
            "compression": {"codec": self.codec},
            "placement": {"workers": self.workers, "min_workers": self.workers},
        }


def write_examples(directory: Path, workers: int) -> Path:
    """The parts of all seats and the test images, as files that need nothing of Cortex to be read.

    Raises:
        NotFoundError: Fashion-MNIST is not on this machine and cannot be had.
    """
    cache = fashion.default_cache_dir()
    fetch("fashion-mnist", cache)
    directory.mkdir(parents=True, exist_ok=True)
    train, test = load("fashion-mnist", cache), load("fashion-mnist-test", cache)
    for seat, chosen in enumerate(partition(train.labels, Partition("iid", 0), workers)):
        inputs, labels = train.take(chosen)
        np.savez(directory / f"seat-{seat}.npz", inputs=inputs.reshape(len(inputs), -1), labels=labels)
    inputs, labels = test.take(slice(None))
    np.savez(directory / "test.npz", inputs=inputs.reshape(len(inputs), -1), labels=labels)
    return directory


def train_with_cortex(network: RunningNetwork, task: TrainingTask) -> Curve:
    """Submit it to a network that is up, and follow its status.

    Raises:
        BenchmarkError: it did not complete.
    """
    points: list[Point] = []
    last: JobStatus | None = None
    with Client(directory=network.directory) as client:
        before = network.usage()
        submitted_s = time.monotonic()
        for last in client.watch(client.submit(task.job())):
            at_s = time.monotonic() - submitted_s
            known = [report.metrics.get("test_accuracy") for report in last.history]
            accuracies = [accuracy for accuracy in known if accuracy is not None]
            points += [Point(at_s, accuracy) for accuracy in accuracies[len(points) :]]
        used = network.usage().since(before)
    if last is None or last.status is not JobPhase.COMPLETED:
        raise BenchmarkError(f"training with {task.algorithm}: {last.error if last else 'no status'}")
    return Curve(points, used.total_s, used.others)
