"""CortexModel: the network of a job, built from its `model` section; kinds are found in a registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import ModelSpec


class CortexModel(nn.Module, ABC):
    """A classifier built from configuration: inputs (batch, ...) to logits (batch, classes).

    Names and order of its state dict are the model's layout: they must depend on the spec alone.

    >>> import torch
    >>> from cortex_common.job.spec import ModelSpec
    >>> from cortex_common.model import build_model
    >>> model = build_model(ModelSpec(input_dim=784, hidden_dims=(32,), output_dim=10), seed=1)
    >>> model(torch.zeros(5, 28, 28)).shape
    torch.Size([5, 10])
    >>> model.parameter_count
    25450
    >>> type(model).__mro__[1].__name__
    'CortexModel'
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of a batch."""

    @property
    def parameter_count(self) -> int:
        """Numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


Kind = TypeVar("Kind", bound=type[CortexModel])
_KINDS: dict[str, type[CortexModel]] = {}


def register(kind: str) -> Callable[[Kind], Kind]:
    """Make a class the network of `model.kind: <kind>`."""

    def add(cls: Kind) -> Kind:
        _KINDS[kind] = cls
        return cls

    return add


def build_model(spec: ModelSpec, seed: int) -> CortexModel:
    """The network with initial weights that depend on spec and seed only; torch's own random state is left alone.

    Raises:
        InvalidArgumentError: unknown kind, or a pattern in `freeze` that fits no parameter.
    """
    network = _KINDS.get(spec.kind)
    if network is None:
        raise InvalidArgumentError(f"model.kind: {spec.kind!r} given; allowed: {', '.join(sorted(_KINDS))}")
    with torch.random.fork_rng(devices=[]):
        # Networks are made in main memory; torch.manual_seed would start every GPU's numbers anew too.
        torch.default_generator.manual_seed(seed)
        model = network(spec)
    freeze(model, spec.freeze)
    return model


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Keep the parameters whose names fit a pattern (`hidden_1.*`) as they are.

    Raises:
        InvalidArgumentError: a pattern fits nothing; lists the names.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            raise InvalidArgumentError(
                f"model.freeze: {pattern!r} fits no parameter; there are: {', '.join(parameters)}"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)
