"""Data that a program brings itself: any torch DataLoader of (inputs, labels)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import ModelSpec
from cortex_common.logging import get_logger
from cortex_common.model import CortexModel, build_model, copy_from_arena
from cortex_common.tensors import Arena
from services.worker.failures import WorkFailedError
from services.worker.trainer.examples import Examples

_log = get_logger(__name__)
_ONCE = (
    "the DataLoader gives no batch when it is gone through again; allowed: one that gives its batches in every round"
)


class LoaderData:
    """A DataLoader as the data of a job: every seat that comes here trains on all of it, in the loader's batches."""

    def __init__(self, loader: DataLoader[Any], model: ModelSpec) -> None:
        """Look at the first batch.

        Raises:
            InvalidArgumentError: that is no loader, or it gives nothing, or what this model does not take.
        """
        self._loader = loader
        self._model = model
        inputs, labels = _first(loader, model)
        if inputs.dtype is torch.uint8:
            _log.warning("inputs_are_bytes", reason="taken as they are; networks learn better from inputs / 255")
        self._batch = len(labels)

    @property
    def examples(self) -> int:
        """How many a pass gives, as far as the loader knows."""
        return self._size[0]

    @property
    def batch_size(self) -> int | None:
        """Examples of one batch; None where only the loader knows."""
        sampler = getattr(self._loader, "batch_sampler", None)
        size = getattr(self._loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        return size if isinstance(size, int) else None

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Examples and batches of a pass. A loader that does not know is gone through, once.

        Raises:
            InvalidArgumentError: it gives nothing when it is gone through again.
        """
        try:
            batches = len(self._loader)
        except TypeError:  # an IterableDataset without a length
            return self._counted()
        sampler = getattr(getattr(self._loader, "batch_sampler", None), "sampler", None)
        if isinstance(sampler, Sized):
            return len(sampler), batches
        dataset = getattr(self._loader, "dataset", None)
        if self.batch_size is not None and isinstance(dataset, Sized):
            return len(dataset), batches
        return batches * self._batch, batches

    def _counted(self) -> tuple[int, int]:
        _log.warning("batches_are_counted", reason="the DataLoader has no length; it is gone through to its end, once")
        examples = batches = 0
        for batch in self._loader:
            examples += len(_checked(batch, self._model)[1])
            batches += 1
        if not batches:
            raise InvalidArgumentError(_ONCE)
        return examples, batches

    def training_part(self, seat: int, seats: int, device: torch.device) -> LoaderExamples:
        """All of it."""
        return LoaderExamples(self._loader, self._model, *self._size, device)

    def test_slice(self, index: int, slices: int, device: torch.device) -> Examples:
        """Nobody tests here.

        Raises:
            WorkFailedError: always.
        """
        raise WorkFailedError("this node has training data only", is_permanent=False)


class LoaderExamples:
    """One pass after another over a DataLoader."""

    def __init__(
        self, loader: DataLoader[Any], model: ModelSpec, examples: int, batches: int, device: torch.device
    ) -> None:
        self._loader = loader
        self._model = model
        self._examples = examples
        self._batches = max(1, batches)
        self._device = device

    def __len__(self) -> int:
        return self._examples

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of the loader, whatever size they have."""
        return self._batches

    def endless_batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches, on the trainer's device.

        Raises:
            WorkFailedError: a batch is not what this model takes, or a pass gives none.
        """
        while True:
            is_empty = True
            for batch in self._loader:
                is_empty = False
                try:
                    inputs, labels = _checked(batch, self._model)
                except InvalidArgumentError as error:
                    raise WorkFailedError(str(error), is_permanent=True) from None
                yield (
                    inputs.to(self._device, torch.float32, non_blocking=True),
                    labels.to(self._device, torch.int64, non_blocking=True),
                )
            if is_empty:
                raise WorkFailedError(_ONCE, is_permanent=True)


def model_of(spec: ModelSpec, arena: Arena) -> CortexModel:
    """The network with these weights, ready to be asked."""
    model = build_model(spec, seed=0)
    copy_from_arena(model, arena)
    return model.eval()


def _first(loader: DataLoader[Any], model: ModelSpec) -> tuple[Tensor, Tensor]:
    # Every round goes through it again, which something like a generator allows once only.
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise InvalidArgumentError(f"{type(loader).__name__} given; allowed: a torch DataLoader")
    batch = next(iter(loader), None)
    if batch is None:
        raise InvalidArgumentError("the DataLoader gives no batch; allowed: at least one")
    return _checked(batch, model)


def _checked(batch: Any, model: ModelSpec) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        given = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise InvalidArgumentError(f"the DataLoader gives a {given}; allowed: pairs (inputs, labels)")
    inputs, labels = torch.as_tensor(batch[0]), torch.as_tensor(batch[1])
    if not labels.numel():
        raise InvalidArgumentError("the DataLoader gives a batch of nothing; allowed: at least one example")
    _check_inputs(inputs, model)
    _check_labels(labels, model)
    return inputs, labels


def _check_inputs(inputs: Tensor, model: ModelSpec) -> None:
    values = math.prod(inputs.shape[1:])
    if inputs.dim() < 2 or values != model.input_dim:
        raise InvalidArgumentError(
            f"the DataLoader gives inputs of shape {tuple(inputs.shape)}, {values} values each; training.input_dim is "
            f"{model.input_dim}"
        )
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidArgumentError("the DataLoader gives inputs that are not finite; allowed: neither NaN nor infinity")


def _remedy(labels: Tensor) -> str:
    if labels.dim() == 2:
        return (
            "; labels.flatten() makes such of these"
            if labels.shape[1] == 1
            else "; labels.argmax(1) makes such of these"
        )
    return "; labels.long() makes such of these" if labels.dim() == 1 else ""


def _check_labels(labels: Tensor, model: ModelSpec) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise InvalidArgumentError(
            f"the DataLoader gives labels of shape {tuple(labels.shape)} and type {labels.dtype}; allowed: one class "
            f"number an input, whole numbers{_remedy(labels)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.output_dim:
        raise InvalidArgumentError(
            f"the DataLoader gives labels from {low} to {high}; training.output_dim {model.output_dim} allows 0 to "
            f"{model.output_dim - 1}"
        )
