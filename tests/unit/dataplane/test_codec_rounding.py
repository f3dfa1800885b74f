"""Stochastic rounding: unbiased, reproducible, different for every chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cortex_common.codec import WeightCompressor, rounding_seed

LARGEST, TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
UNBIASED = [("int8", {"stochastic": True}), ("int4", {"stochastic": True}), ("int4", {"block": 16, "stochastic": True})]


@pytest.mark.parametrize(("name", "options"), UNBIASED)
def test_stochastic_rounding_is_unbiased(name: str, options: dict) -> None:
    codec = WeightCompressor.create(name, options)
    values_n = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    runs = 400
    total = np.zeros(values_n.size)
    for run in range(runs):
        codec.decode_add(codec.encode(values_n, seed=run), total, 1.0)
    error = total / runs - values_n
    block = int(options.get("block", 256 if name == "int8" else 128))
    absmax = np.abs(values_n[: values_n.size // block * block].reshape(-1, block)).max(axis=1)
    step = np.repeat(absmax / (127 if name == "int8" else 7), block)
    z = error[: step.size] / (step * 0.5 / np.sqrt(runs))  # a rounding error's deviation is half a step at most
    assert np.abs(z).max() < 5.5
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    nearest = WeightCompressor.create(name, options | {"stochastic": False})
    biased = nearest.decode(nearest.encode(values_n), values_n.size) - values_n
    assert np.abs(error).mean() < np.abs(biased).mean() / 5


@given(
    st.sampled_from([*UNBIASED, ("topk", {"density": 0.5, "stochastic": True})]),
    arrays(np.float32, 70, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
)
@settings(max_examples=50)
def test_stochastic_rounding_is_unbiased_whatever_the_values(variant: tuple[str, dict], values_n: np.ndarray) -> None:
    """Zero, denormal, huge and far apart: the mean lies within what chance allows a sum of so many roundings."""
    codec, runs = WeightCompressor.create(*variant), 256
    decoded = [codec.decode(codec.encode(values_n, seed=run), values_n.size).astype(np.float64) for run in range(runs)]
    exact = values_n.astype(np.float64)
    if codec.codec == "topk":
        sent = np.any(decoded, axis=0)
        exact = np.where(sent, exact, 0)
    levels, block = (7 if codec.codec == "int4" else 127), variant[1].get("block", values_n.size)
    absmax = np.maximum.reduceat(np.abs(exact), np.arange(0, values_n.size, block))
    step = np.repeat(absmax / levels, block)[: values_n.size]
    # Hoeffding: a mean of roundings, each within a step, is off by more than this once in 10^13. The largest float may
    # be rounded down to stay finite, and what is smaller than the smallest normal step is not told apart.
    allowed = 4 * step / np.sqrt(runs) + np.where(step > 0.8 * LARGEST / levels, step, 0) + levels * TINY
    assert (np.abs(np.mean(decoded, axis=0) - exact) <= allowed).all()


def test_values_below_half_a_step_survive_on_average_only_stochastically() -> None:
    values_n = np.full(4096, 0.03, np.float32)
    values_n[::128] = 1.0
    means = {}
    for stochastic in (False, True):
        codec = WeightCompressor.create("int4", {"stochastic": stochastic})
        decoded = codec.decode(codec.encode(values_n, seed=5), values_n.size)
        means[stochastic] = float(decoded[values_n < 1].mean())
    assert means[False] == 0
    assert means[True] == pytest.approx(0.03, rel=0.1)


@given(st.integers(-(2**70), 2**70), st.sampled_from(["int8", "int4"]))
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(seed: int, name: str) -> None:
    codec = WeightCompressor.create(name, {"stochastic": True})
    values_n = np.random.default_rng(2).standard_normal(600).astype(np.float32)
    assert codec.encode(values_n, seed=seed) == codec.encode(values_n.copy(), seed=seed)
    assert codec.encode(values_n, seed=seed) != codec.encode(values_n, seed=seed + 1)


def test_neighbouring_seeds_round_independently() -> None:
    codec = WeightCompressor.create("int4", {"block": 65536, "stochastic": True})
    values_n = np.full(1 << 16, 0.5, np.float32)
    values_n[0] = 7.0
    ups = [codec.decode(codec.encode(values_n, seed=seed), values_n.size)[1:] > 0 for seed in range(8)]
    for i, mine in enumerate(ups):
        assert mine.mean() == pytest.approx(0.5, abs=0.01)
        assert np.corrcoef(mine[:-1], mine[1:])[0, 1] == pytest.approx(0, abs=0.02)
        for other in ups[i + 1 :]:
            assert np.corrcoef(mine, other)[0, 1] == pytest.approx(0, abs=0.02)


def test_without_the_option_the_seed_does_not_matter() -> None:
    values_n = np.random.default_rng(3).standard_normal(600).astype(np.float32)
    for name in ("none", "bf16", "int8", "int4", "topk"):
        codec = WeightCompressor.create(name)
        assert codec.encode(values_n, seed=1) == codec.encode(values_n, seed=2)


def test_a_rounding_seed_tells_its_parts_apart() -> None:
    seeds = {
        rounding_seed(*parts) for parts in [(1, 2, 3), (1, 23), (12, 3), ("1", 2, 3), (1, 2, 4), (1, 2), ("1\x1f2",)]
    }
    assert len(seeds) == 7
    assert rounding_seed(7, 1, 0, 5) == rounding_seed(7, 1, 0, 5)
    assert all(0 <= seed < 2**64 for seed in seeds)
