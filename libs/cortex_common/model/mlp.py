"""Multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from cortex_common.job.spec import ModelSpec
from cortex_common.model.base import CortexModel, register


@register("mlp")
class MultilayerPerceptron(CortexModel):
    """Linear layers with ReLU (and dropout) between them; inputs are flattened.

    State: hidden_1.weight, hidden_1.bias … output.weight, output.bias, the same names whatever the dropout.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        widths = (spec.input_dim, *spec.hidden_dims)
        self._hidden = [f"hidden_{depth}" for depth in range(1, len(widths))]
        for name, (width_in, width_out) in zip(self._hidden, pairwise(widths), strict=True):
            self.add_module(name, nn.Linear(width_in, width_out))
        self.output = nn.Linear(widths[-1], spec.output_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (batch, output_dim) of inputs (batch, ...) with input_dim values each."""
        hidden = inputs.flatten(1)
        for name in self._hidden:
            hidden = nn.functional.relu(self.get_submodule(name)(hidden))
            if self.spec.dropout:
                hidden = nn.functional.dropout(hidden, self.spec.dropout, self.training)
        logits: Tensor = self.output(hidden)
        return logits
