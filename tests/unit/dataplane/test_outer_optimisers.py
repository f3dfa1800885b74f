"""Outer optimisers against an independent float64 reference, torch, and a problem they must solve."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from cortex_common.errors import InvalidArgumentError
from services.aggregator.strategies import OuterStrategy, create_strategy

Vector = NDArray[np.float64]
ELEMENTS = 40_001
"""More than two of the pieces a strategy works on."""


def started(strategy: OuterStrategy, elements: int) -> NDArray[np.float32]:
    state = np.full((strategy.slots, elements), np.nan, np.float32)
    strategy.begin(state)
    return state


def stepped(strategy: OuterStrategy, base: NDArray[np.float32], means: list[Vector]) -> NDArray[np.float32]:
    values, state = base.copy(), started(strategy, base.size)
    for mean in means:
        before = mean.copy()
        strategy.step(values, mean, state, values)
        assert mean.tobytes() == before.tobytes()
    return values


def reference(name: str, o: dict[str, float], base: Vector, means: list[Vector]) -> Vector:
    """The papers' formulas, with the outer gradient theta - local and everything in float64."""
    theta, eta = base.copy(), o["server_learning_rate"]
    b, m, v = np.zeros_like(base), np.zeros_like(base), np.full_like(base, o.get("tau", 0.0) ** 2)
    for mean in means:
        gradient = -mean
        if name == "fedavg":
            theta = theta - eta * gradient
        elif name in ("fedavgm", "diloco"):
            b = o["momentum"] * b + gradient
            theta = theta - eta * (b if name == "fedavgm" else gradient + o["momentum"] * b)
        else:
            g = mean
            m = o["beta1"] * m + (1 - o["beta1"]) * g
            if name == "fedadam":
                v = o["beta2"] * v + (1 - o["beta2"]) * g**2
            elif name == "fedyogi":
                v = v - (1 - o["beta2"]) * g**2 * np.sign(v - g**2)
            else:
                v = v + g**2
            theta = theta + eta * m / (np.sqrt(v) + o["tau"])
    return theta


OPTIONS = [
    ("fedavg", {"server_learning_rate": 1.0}),
    ("fedavg", {"server_learning_rate": 0.5}),
    ("fedavgm", {"server_learning_rate": 0.3, "momentum": 0.95}),
    ("diloco", {"server_learning_rate": 0.7, "momentum": 0.9}),
    ("fedadam", {"server_learning_rate": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}),
    ("fedyogi", {"server_learning_rate": 0.03, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2}),
    ("fedadagrad", {"server_learning_rate": 0.1, "beta1": 0.9, "tau": 1e-3}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_steps_equal_a_float64_reference_within_the_rounding_of_float32(name: str, options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(ELEMENTS).astype(np.float32)
    means = [rng.standard_normal(ELEMENTS) * 10.0 ** rng.integers(-4, 1) for _ in range(6)]
    strategy = create_strategy(name, json.dumps(options))
    want = reference(name, options, base.astype(np.float64), means)
    got = stepped(strategy, base, means)
    scale = np.abs(base) + sum(np.abs(mean) for mean in means) * 10
    assert np.max(np.abs(got - want) / scale) < 6 * np.finfo(np.float32).eps
    if options == {"server_learning_rate": 1.0}:
        assert stepped(strategy, base, means[:1]).tobytes() == (base + means[0]).astype(np.float32).tobytes()


@pytest.mark.parametrize(("name", "nesterov"), [("fedavgm", False), ("diloco", True)])
def test_momentum_is_that_of_torch_on_the_pseudo_gradient(name: str, nesterov: bool) -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(ELEMENTS).astype(np.float32)
    means = [0.1 * rng.standard_normal(ELEMENTS) for _ in range(8)]
    theta = torch.tensor(base, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.4, momentum=0.8, nesterov=nesterov)
    for mean in means:
        theta.grad = torch.from_numpy(-mean)
        optimizer.step()
    got = stepped(create_strategy(name, '{"server_learning_rate":0.4,"momentum":0.8}'), base, means)
    np.testing.assert_allclose(got, theta.detach().numpy(), rtol=0, atol=8 * 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_range_is_worked_alone(name: str, options: dict[str, float]) -> None:
    rng = np.random.default_rng(2)
    base, means = rng.standard_normal(ELEMENTS).astype(np.float32), [rng.standard_normal(ELEMENTS) for _ in range(3)]
    strategy = create_strategy(name, json.dumps(options))
    whole = stepped(strategy, base, means)
    ranges = [slice(0, 300), slice(300, 20_000), slice(20_000, None)]
    parts = [stepped(strategy, base[each], [mean[each] for mean in means]) for each in ranges]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [("other", "{}"), ("fedavg", '{"a":1}'), ("fedavg", "[]"), ("fedavg", "{"), ("diloco", '{"momentum":1}')],
)
def test_what_is_not_known_is_refused(name: str, options: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"strategy '?{name}"):
        create_strategy(name, options)


def test_two_ways_to_say_the_same_have_one_layout() -> None:
    assert create_strategy("diloco", "").layout == create_strategy("diloco", '{"momentum":0.9}').layout
    assert create_strategy("diloco", '{"momentum":0.8}').layout != create_strategy("diloco", "").layout
    assert create_strategy("fedavgm", "").layout != create_strategy("diloco", "").layout


def softmax_loss(theta: Vector, features: Vector, labels: NDArray[np.int64]) -> tuple[float, Vector]:
    """Mean cross-entropy of a softmax regression, and its gradient."""
    logits = features @ theta.reshape(-1, 10)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    loss = -np.log(odds[np.arange(len(labels)), labels]).mean()
    odds[np.arange(len(labels)), labels] -= 1
    return float(loss), (features.T @ odds / len(labels)).reshape(-1)


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("fedavg", {}, 0.6),
        ("fedavgm", {}, 0.15),
        ("diloco", {}, 0.2),
        ("diloco", {"server_learning_rate": 0.1}, 0.6),
        ("fedadam", {}, 0.15),
        ("fedyogi", {"server_learning_rate": 0.03}, 0.2),
        ("fedadagrad", {}, 0.4),
    ],
)
def test_four_workers_learn_the_digits_from_skewed_shares(name: str, options: dict[str, float], bound: float) -> None:
    images, labels = load_digits(return_X_y=True)
    features = np.hstack([images / 16, np.ones((len(images), 1))])
    order = np.argsort(labels % 5, kind="stable")
    shares = [(features[share], labels[share]) for share in np.array_split(order, 4)]
    strategy = create_strategy(name, json.dumps(options))
    theta = np.zeros(650, np.float32)
    state = started(strategy, theta.size)

    def local(start: Vector, share: tuple[Vector, NDArray[np.int64]]) -> Vector:
        end = start.copy()
        for _ in range(10):
            end -= 0.1 * softmax_loss(end, *share)[1]
        return end - start

    for _ in range(40):
        base = theta.astype(np.float64)
        strategy.step(theta, np.mean([local(base, share) for share in shares], axis=0), state, theta)
    assert softmax_loss(theta.astype(np.float64), features, labels)[0] < bound
