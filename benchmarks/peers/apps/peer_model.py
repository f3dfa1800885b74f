"""The network of the tasks, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Perceptron(nn.Sequential):
    """A multilayer perceptron with weights and biases of these shapes, initialised by PyTorch from seed 0, or zero."""

    def __init__(self, shapes: Sequence[Sequence[int]], is_zero: bool = False) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for width_out, width_in in shapes[::2]:
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])
        if is_zero:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()
