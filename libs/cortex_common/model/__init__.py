"""Networks from configuration, and how their state lies in the flat arena. Imports torch."""

from __future__ import annotations

from cortex_common.model.base import CortexModel, build_model, freeze, register
from cortex_common.model.layout import bind_to_arena, copy_from_arena, copy_to_arena, load_tensors, manifest_of
from cortex_common.model.mlp import MultilayerPerceptron

__all__ = [
    "CortexModel",
    "MultilayerPerceptron",
    "bind_to_arena",
    "build_model",
    "copy_from_arena",
    "copy_to_arena",
    "freeze",
    "load_tensors",
    "manifest_of",
    "register",
]
