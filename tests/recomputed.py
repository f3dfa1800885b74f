"""What a job with plain averages must give, computed beside it: each seat trains once a round and is added once."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
import torch

from cortex_common.clock import SystemClock
from cortex_common.job.spec import JobSpec
from cortex_common.model import copy_to_arena, manifest_of
from cortex_common.tensors import Arena, Manifest, write_safetensors
from services.worker.trainer.batches import TrainingExamples
from services.worker.trainer.loop import ModelTrainer


def digests(spec: JobSpec, seats: Sequence[TrainingExamples]) -> list[str]:
    """SHA-256 of the version of every round, as a safetensors file.

    Args:
        spec: With strategy fedavg and codec none.
        seats: What each trains on.
    """
    found = []
    with _one_thread():
        trainer = ModelTrainer(spec, torch.device("cpu"), SystemClock())
        manifest = manifest_of(trainer.model)
        version, result = Arena.zeros(manifest), Arena.zeros(manifest)
        copy_to_arena(trainer.model, version)
        for number in range(1, spec.training.rounds + 1):
            total = np.zeros(version.values.size, np.float64)
            for seat, examples in enumerate(seats):
                trainer.train(version, result, examples, round_number=number, seat=seat)
                total += len(examples) * (result.values - version.values).astype(np.float64)
            mean = total / sum(map(len, seats))
            version.values[:] = (version.values + mean).astype(np.float32)
            found.append(_digest(manifest, version))
    return found


def _digest(manifest: Manifest, version: Arena) -> str:
    file = io.BytesIO()
    write_safetensors(file, manifest, version)
    return sha256(file.getvalue()).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """As many as the trainers have: the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
