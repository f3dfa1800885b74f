"""A network's state in the flat arena: the layout, binding (state becomes views of the arena) and copying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors import Arena, Manifest, TensorKind


def manifest_of(model: nn.Module) -> Manifest:
    """The layout of the model's state, in the order of its state dict.

    Frozen parameters are part of it: they travel as zeros in an update, and the downloaded model is whole.

    Raises:
        InvalidArgumentError: a tensor is neither floating nor integer.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Manifest.of((name, tuple(tensor.shape), _kind(name, tensor, parameters)) for name, tensor in _state(model))


def bind_to_arena(model: nn.Module, arena: Arena) -> None:
    """Make the model's parameters and buffers views of the arena: what trains the model writes the arena.

    The arena's numbers are taken over; the model's are lost. For a model in this process's memory (CPU).

    Raises:
        InvalidArgumentError: the arena has another size.
    """
    manifest = manifest_of(model)
    arena.require(manifest)
    for entry in manifest.entries:
        view = torch.from_numpy(arena.view(entry))
        owner, _, name = entry.name.rpartition(".")
        module = model.get_submodule(owner)
        if name in module._parameters:
            parameter = module._parameters[name]
            assert parameter is not None  # noqa: S101  it is in the state dict
            parameter.data = view
        else:
            module._buffers[name] = view


@torch.no_grad()
def copy_from_arena(model: nn.Module, arena: Arena) -> None:
    """Set the model's state, wherever it lies, to the arena's numbers."""
    _copy(model, arena, into_arena=False)


@torch.no_grad()
def copy_to_arena(model: nn.Module, arena: Arena) -> None:
    """Set the arena's numbers to the model's state, wherever it lies."""
    _copy(model, arena, into_arena=True)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, NDArray[Any]], source: str) -> list[str]:
    """Take over weights by name, for fine-tuning; what the file lacks or has in another shape keeps its own.

    Returns:
        Names taken over.

    Raises:
        InvalidArgumentError: nothing fits.
    """
    taken = []
    for name, tensor in _state(model):
        values = tensors.get(name)
        if values is not None and tuple(values.shape) == tuple(tensor.shape):
            tensor.copy_(torch.from_numpy(values))
            taken.append(name)
    if not taken:
        raise InvalidArgumentError(
            f"{source}: no tensor fits the model by name and shape; it has {', '.join(sorted(tensors)[:20])}, "
            f"the model {', '.join(name for name, _ in _state(model))}"
        )
    return taken


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict(keep_vars=True).items()


def _kind(name: str, tensor: Tensor, parameters: set[str]) -> TensorKind:
    if tensor.dtype == torch.int64 and name not in parameters:
        return TensorKind.COUNTER
    if tensor.dtype != torch.float32:
        raise InvalidArgumentError(f"model tensor {name!r} has type {tensor.dtype}; allowed: float32, int64 buffers")
    return TensorKind.TRAINABLE if name in parameters else TensorKind.BUFFER


def _copy(model: nn.Module, arena: Arena, *, into_arena: bool) -> None:
    manifest = manifest_of(model)
    arena.require(manifest)
    for (_, tensor), entry in zip(_state(model), manifest.entries, strict=True):
        view = torch.from_numpy(arena.view(entry))
        if into_arena:
            view.copy_(tensor)
        else:
            tensor.copy_(view)
