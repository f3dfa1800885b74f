"""Networks from configuration and their place in the arena."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import ModelSpec
from cortex_common.model import (
    bind_to_arena,
    build_model,
    copy_from_arena,
    copy_to_arena,
    freeze,
    load_tensors,
    manifest_of,
)
from cortex_common.tensors import Arena, Manifest, TensorKind, safetensors_parts


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**({"input_dim": 12, "hidden_dims": (8, 5), "output_dim": 3} | changes))


class WithState(nn.Module):
    """Parameters, averaged buffers and a counter, as batch norm has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(inputs))


def test_the_network_is_the_one_of_the_readme() -> None:
    model = build_model(ModelSpec(input_dim=784, hidden_dims=(512, 256), output_dim=10), 0)
    assert model.parameter_count == 535_818
    assert model(torch.zeros(2, 28, 28)).shape == (2, 10)


def test_it_computes_what_torch_computes() -> None:
    model = build_model(spec(), 0)
    state = list(model.state_dict().values())
    reference = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    reference.load_state_dict(dict(zip(reference.state_dict(), state, strict=True)))
    inputs = torch.randn(7, 12)
    assert torch.equal(model(inputs), reference(inputs))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(spec(), 5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "torch's own state must be left alone"
    second, other = build_model(spec(), 5), build_model(spec(), 6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.output.weight, other.output.weight)  # type: ignore[union-attr,arg-type]


def test_names_are_the_same_whatever_the_dropout() -> None:
    assert manifest_of(build_model(spec(), 0)).sha256 == manifest_of(build_model(spec(dropout=0.5), 0)).sha256


def test_dropout_works_in_training_only() -> None:
    model = build_model(spec(dropout=0.5), 0)
    inputs = torch.randn(4, 12)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_a_network_without_hidden_layers_is_linear() -> None:
    assert [e.name for e in manifest_of(build_model(spec(hidden_dims=()), 0)).entries] == [
        "output.weight",
        "output.bias",
    ]


def test_the_layout_follows_the_state_dict() -> None:
    manifest = manifest_of(build_model(spec(), 0))
    assert [entry.name for entry in manifest.entries] == [
        *("hidden_1.weight", "hidden_1.bias", "hidden_2.weight", "hidden_2.bias"),
        *("output.weight", "output.bias"),
    ]
    assert {entry.kind for entry in manifest.entries} == {TensorKind.TRAINABLE}
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_buffers_and_counters_have_their_own_kind() -> None:
    kinds = {entry.name: entry.kind for entry in manifest_of(WithState()).entries}
    assert kinds["norm.running_mean"] is TensorKind.BUFFER
    assert kinds["norm.num_batches_tracked"] is TensorKind.COUNTER


def test_a_tensor_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"first\.weight.*float64"):
        manifest_of(WithState().double())


def test_training_a_bound_model_writes_the_arena() -> None:
    model = WithState()
    manifest = manifest_of(model)
    arena = Arena.zeros(manifest)
    copy_to_arena(model, arena)
    bind_to_arena(model, arena)
    before = arena.values.copy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not np.array_equal(before, arena.values)
    assert arena.counters.tolist() == [1]
    views = arena.views(manifest)
    for name, tensor in model.state_dict().items():
        assert np.array_equal(views[name], tensor.numpy())
        assert tensor.data_ptr() == views[name].ctypes.data


def test_state_survives_the_way_through_the_arena() -> None:
    model, other = build_model(spec(), 1), build_model(spec(), 2)
    arena = Arena.zeros(manifest_of(model))
    copy_to_arena(model, arena)
    copy_from_arena(other, arena)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_file_people_download_has_the_models_tensors() -> None:
    model = build_model(spec(), 1)
    arena = Arena.zeros(manifest_of(model))
    copy_to_arena(model, arena)
    loaded = load_safetensors(b"".join(bytes(part) for part in safetensors_parts(manifest_of(model), arena)))
    assert list(loaded)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_an_arena_of_another_size_is_refused() -> None:
    model = build_model(spec(), 0)
    with pytest.raises(InvalidArgumentError, match="elements"):
        bind_to_arena(model, Arena(np.zeros(3, np.float32), np.zeros(0, np.int64)))


def test_freezing_keeps_what_fits_the_pattern() -> None:
    model = build_model(spec(freeze=("hidden_*",)), 0)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["output.weight", "output.bias"]


def test_a_pattern_that_fits_nothing_lists_the_names() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'layer\*' fits no parameter; there are: hidden_1\.weight"):
        freeze(build_model(spec(), 0), ["layer*"])


def test_weights_of_another_model_are_taken_over_where_they_fit() -> None:
    model = build_model(spec(), 0)
    tensors = {name: value.numpy() + 1 for name, value in build_model(spec(output_dim=7), 0).state_dict().items()}
    taken = load_tensors(model, tensors, "old.safetensors")
    assert taken == ["hidden_1.weight", "hidden_1.bias", "hidden_2.weight", "hidden_2.bias"]
    with pytest.raises(InvalidArgumentError, match=r"old\.safetensors: no tensor fits"):
        load_tensors(model, {"a": np.zeros(3)}, "old.safetensors")
