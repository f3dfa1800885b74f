"""What a contestant's processes do, the same for all: read the task, change or train a model, say how far they are.

It runs in the environments of other systems, so it imports nothing of Cortex.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

STEP = 2.0**-10
"""What a client of seat s adds to each parameter in a round without training: (s + 1) times this, exact in float32."""


@dataclass(frozen=True)
class Task:
    """The file that the environment variable BENCHMARK_TASK names.

    Attributes:
        shapes: Of the model's arrays.
        rounds: How many, warm-up included.
        events: File that gets a line of JSON for each finished round.
        data: Directory of the examples; empty for rounds without training.
        every: Steps between two exchanges of weights.
        algorithm: For Gloo alone: allreduce, ddp, fedavg or diloco.
    """

    shapes: tuple[tuple[int, ...], ...]
    rounds: int
    workers: int
    events: str
    data: str = ""
    batch_size: int = 32
    learning_rate: float = 1e-3
    every: int = 0
    algorithm: str = ""
    target: float = 1.0

    @classmethod
    def load(cls) -> Task:
        """The task as it is now."""
        fields = json.loads(Path(os.environ["BENCHMARK_TASK"]).read_text())
        fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
        return cls(**fields)

    def start_arrays(self) -> list[np.ndarray]:
        """The model that round 1 begins with."""
        if self.data:
            return arrays_of(network(self.shapes))
        return [np.zeros(shape, np.float32) for shape in self.shapes]

    def say(self, done: int, last: np.ndarray, accuracy: float | None = None, seconds: float | None = None) -> None:
        """Tell that a round is over (0: about to begin), and what it made of the model's last value.

        Args:
            done: Number of the round.
            last: The model's last array.
            accuracy: Of the model, if measured.
            seconds: The contestant's own count, if more is done between rounds than should count.
        """
        value = float(last.flat[-1])
        event = {"round": done, "at": time.monotonic(), "value": value, "accuracy": accuracy, "seconds": seconds}
        with Path(self.events).open("a") as file:
            file.write(json.dumps(event) + "\n")

    def say_model(self, done: int, arrays: Sequence[Any]) -> float | None:
        """Tell that a round is over, and how good its model is if there are examples."""
        accuracy = Evaluation(self).of([np.asarray(array) for array in arrays]) if self.data else None
        self.say(done, np.asarray(arrays[-1]), accuracy)
        return accuracy


def changed(arrays: Sequence[np.ndarray], seat: int) -> list[np.ndarray]:
    """The round without training: every value moved a little, for some systems drop what they have seen before."""
    return [array + np.float32((seat + 1) * STEP) for array in arrays]


def network(shapes: Sequence[Sequence[int]]) -> Any:
    """The multilayer perceptron with these weights and biases."""
    from peer_model import Perceptron

    return Perceptron(shapes)


def arrays_of(model: Any) -> list[np.ndarray]:
    """Weights and biases in order."""
    return [value.detach().numpy().copy() for value in model.state_dict().values()]


def load_arrays(model: Any, arrays: Sequence[np.ndarray]) -> None:
    """Put weights and biases in order into a model."""
    import torch

    names = model.state_dict().keys()
    model.load_state_dict({name: torch.tensor(array) for name, array in zip(names, arrays, strict=True)})


class Trainer:
    """Local training of one seat: Adam made anew each round, one thread, batches of a fresh order each epoch."""

    def __init__(self, task: Task, seat: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._task = task
        with np.load(Path(task.data) / f"seat-{seat}.npz") as file:
            self._inputs = torch.from_numpy(file["inputs"])
            self._labels = torch.from_numpy(file["labels"])
        self.examples = len(self._labels)
        self.model = network(task.shapes)
        self._generator = torch.Generator().manual_seed(seat)
        self._left: list[Any] = []

    def epoch_steps(self) -> int:
        """Batches in one epoch."""
        return -(-self.examples // self._task.batch_size)

    def batch(self) -> tuple[Any, Any]:
        """The next inputs and labels."""
        import torch

        if not self._left:
            order = torch.randperm(self.examples, generator=self._generator)
            self._left = list(order.split(self._task.batch_size))
        chosen = self._left.pop()
        return self._inputs[chosen], self._labels[chosen]

    def optimizer(self) -> Any:
        """A fresh one."""
        import torch

        # The kernel that Cortex takes: what is compared is not the optimiser.
        return torch.optim.Adam(self.model.parameters(), lr=self._task.learning_rate, fused=True)

    def train(self, steps: int, optimizer: Any = None, model: Any = None) -> None:
        """Some steps."""
        from torch.nn.functional import cross_entropy

        optimizer, model = optimizer or self.optimizer(), model or self.model
        for _ in range(steps):
            inputs, labels = self.batch()
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    def round(self, arrays: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
        """Train the model given for one round."""
        self._generator.manual_seed(seed)
        self._left = []
        load_arrays(self.model, arrays)
        self.train(self._task.every or self.epoch_steps())
        return arrays_of(self.model)


class Evaluation:
    """Accuracy on the test images."""

    _kept: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def __init__(self, task: Task) -> None:
        import torch

        if task.data not in self._kept:
            with np.load(Path(task.data) / "test.npz") as file:
                self._kept[task.data] = (torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"]))
        self._inputs, self._labels = self._kept[task.data]
        self._model = network(task.shapes)

    def of(self, arrays: Sequence[np.ndarray]) -> float:
        """Share of the images that a model with these arrays names rightly."""
        import torch

        load_arrays(self._model, arrays)
        with torch.inference_mode():
            found = self._model(self._inputs).argmax(1)
        return float((found == self._labels).float().mean())
