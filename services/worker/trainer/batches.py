"""Which examples a step sees: seeded by (job seed, round, seat), so that the same work gives the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cortex_common.data.partition import shuffled
from cortex_common.job.spec import TrainingSpec


def local_seed(job_seed: int, round_number: int, seat: int) -> int:
    """64 bits for everything random in one seat's training of one round."""
    digest = hashlib.sha256(f"cortex local training\n{job_seed}\n{round_number}\n{seat}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class TrainingExamples(Protocol):
    """What one seat trains on, wherever it comes from."""

    def __len__(self) -> int:
        """Examples in an epoch; the weight of the update."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in an epoch."""

    def endless_batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs float32 and labels int64 on the trainer's device, epoch after epoch."""


@dataclass(frozen=True, slots=True)
class LocalWork:
    """How much to train: steps, or seconds, or (0 steps) nothing."""

    steps: int | None
    seconds: float | None = None

    @classmethod
    def of(cls, training: TrainingSpec, examples: TrainingExamples) -> LocalWork:
        """What the job asks for, with these examples; a fraction of an epoch is at least one step."""
        if training.local_seconds is not None:
            return cls(None, training.local_seconds)
        if training.local_steps is not None:
            return cls(training.local_steps)
        per_epoch = examples.steps_per_epoch(training.batch_size)
        return cls(max(1, round((training.epochs or 0) * per_epoch)))

    def progress(self, steps: int, elapsed_s: float) -> float:
        """Share that is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, steps / self.steps) if self.steps else 1.0
        return min(1.0, elapsed_s / (self.seconds or elapsed_s or 1.0))

    def is_done(self, steps: int, elapsed_s: float) -> bool:
        """Whether this was enough."""
        if self.steps is not None:
            return steps >= self.steps
        return elapsed_s >= (self.seconds or 0.0)


def batch_indices(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of example indices: each epoch in a new random order, its last batch possibly short."""
    epoch = 0
    while True:
        order = torch.from_numpy(shuffled((seed, epoch), examples))
        for start in range(0, examples, batch_size):
            yield order[start : start + batch_size]
        epoch += 1
