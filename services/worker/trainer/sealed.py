"""Training data that came sealed: opened by the worker, in memory behind a descriptor."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any

import torch

from cortex_common.data.sealed import DatasetManifest, dataset_of
from cortex_common.job.spec import JobSpec
from services.worker.trainer.batches import TrainingExamples
from services.worker.trainer.examples import Examples, JobData, examples_of, fitting


class ShardData:
    """Trains on opened shards; everything else is as before."""

    def __init__(self, examples: Examples, others: JobData) -> None:
        self._examples = examples
        self._others = others
        self._placed: tuple[str, Examples] | None = None

    @classmethod
    def of(cls, spec: JobSpec, told: Mapping[str, Any], descriptor: int, others: JobData) -> ShardData:
        """Copy the examples out of the memory, which is let go of.

        Raises:
            WorkFailedError: they do not fit the model.
            InvalidArgumentError: they are not what their manifest says.
        """
        try:
            memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        manifest = DatasetManifest.model_validate_json(told["manifest"])
        dataset = fitting(dataset_of(manifest, told["shards"], memoryview(memory)), spec, "data.train", manifest.name)
        inner = others._others if isinstance(others, ShardData) else others
        return cls(examples_of(dataset, slice(None)), inner)

    def training_part(self, seat: int, seats: int, device: torch.device) -> TrainingExamples:
        """What this seat trains on: all that was opened for it."""
        if self._placed is None or self._placed[0] != str(device):
            self._placed = (str(device), self._examples.to(device))
        return self._placed[1]

    def test_slice(self, index: int, slices: int, device: torch.device) -> Examples:
        """Slice `index` of the test set, which is one of this node's own."""
        return self._others.test_slice(index, slices, device)
