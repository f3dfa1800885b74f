"""The part of a dataset that one seat trains on, and the test set in slices: loaded once, kept for the whole job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cortex_common.data import Dataset, Partition, known_datasets, load, partition
from cortex_common.data.partition import Indices
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.job.spec import JobSpec, PartitionSpec
from services.worker.failures import WorkFailedError
from services.worker.trainer.batches import TrainingExamples, batch_indices

_EVALUATION_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs float32 (n, ...) and labels int64 (n,), contiguous."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Examples:
        """The same on a device; itself when it is there already."""
        return Examples(self.inputs.to(device), self.labels.to(device))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in an epoch, the last one possibly short."""
        return math.ceil(len(self) / batch_size)

    def endless_batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled anew each epoch; the same seed gives the same batches."""
        for chosen in batch_indices(len(self), batch_size, seed):
            there = chosen.to(self.labels.device)
            yield self.inputs.index_select(0, there), self.labels.index_select(0, there)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """In order, in pieces of a fixed size: sums over them do not depend on memory or device load."""
        for start in range(0, len(self), _EVALUATION_BATCH):
            piece = slice(start, start + _EVALUATION_BATCH)
            yield self.inputs[piece], self.labels[piece]


class JobData(Protocol):
    """The data of one job on one node."""

    def training_part(self, seat: int, seats: int, device: torch.device) -> TrainingExamples:
        """What this seat trains on.

        Raises:
            WorkFailedError: it cannot be had here, or does not fit the model.
        """

    def test_slice(self, index: int, slices: int, device: torch.device) -> Examples:
        """Slice `index` of the test set cut into `slices`.

        Raises:
            WorkFailedError: it cannot be had here, or does not fit the model.
        """


class DataCache:
    """The datasets of one job, from this node's catalogue; loaded once."""

    def __init__(self, spec: JobSpec, cache_dir: Path, catalogue_file: Path | None) -> None:
        self._spec = spec
        self._cache_dir = cache_dir
        self._catalogue_file = catalogue_file
        self._train: dict[tuple[int, int, str], Examples] = {}
        self._test: dict[tuple[int, int, str], Examples] = {}
        self._test_set: Dataset | None = None

    def training_part(self, seat: int, seats: int, device: torch.device) -> Examples:
        """What this seat trains on.

        Raises:
            WorkFailedError: the dataset is not here, damaged, or does not fit the model.
        """
        key = (seat, seats, str(device))
        if key not in self._train:
            dataset = self._load(self._spec.data.train, "data.train")
            parts = partition(dataset.labels, _deal(self._spec.data.partition), seats)
            if not 0 <= seat < seats:
                raise InvalidArgumentError(f"seat {seat} given; allowed: 0 to {seats - 1}")
            self._train = {key: examples_of(dataset, parts[seat]).to(device)}
        return self._train[key]

    def test_slice(self, index: int, slices: int, device: torch.device) -> Examples:
        """Slice `index` of the test set cut into `slices`.

        Raises:
            WorkFailedError: the dataset is not here, damaged, or does not fit the model.
        """
        if not 0 <= index < slices:
            raise InvalidArgumentError(f"slice {index} given; allowed: 0 to {slices - 1}")
        if self._spec.data.test is None:
            raise InvalidArgumentError("data.test: nothing given, so there is nothing to evaluate with")
        if any(key[1] != slices for key in self._test):
            self._test = {}
        key = (index, slices, str(device))
        if key not in self._test:
            if self._test_set is None:
                self._test_set = self._load(self._spec.data.test, "data.test")
            total = len(self._test_set.labels)
            part = slice(index * total // slices, (index + 1) * total // slices)
            self._test[key] = examples_of(self._test_set, part).to(device)
        return self._test[key]

    def _load(self, name: str, key: str) -> Dataset:
        try:
            dataset = load(name, self._cache_dir, self._catalogue_file)
        except (NotFoundError, CorruptError, InvalidArgumentError) as error:
            raise WorkFailedError(f"{key}: {error}", is_permanent=False) from error
        return fitting(dataset, self._spec, key, name)


def fitting(dataset: Dataset, spec: JobSpec, key: str, name: str) -> Dataset:
    """The data set, if the job's model takes it.

    Raises:
        WorkFailedError: it does not.
    """
    model, info = spec.model, dataset.info
    if info.input_dim != model.input_dim or info.classes > model.output_dim:
        raise WorkFailedError(
            f"{key}: {name} has inputs of {info.input_dim} values and {info.classes} classes; the model takes "
            f"input_dim {model.input_dim} and tells output_dim {model.output_dim} classes apart",
            is_permanent=name in known_datasets(),
        )
    return dataset


def _deal(spec: PartitionSpec) -> Partition:
    return Partition(spec.scheme, spec.seed, spec.alpha, spec.per_worker)


def examples_of(dataset: Dataset, chosen: slice | Indices) -> Examples:
    """Normalised copies of a part of a data set."""
    inputs, labels = dataset.take(chosen)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(labels))
