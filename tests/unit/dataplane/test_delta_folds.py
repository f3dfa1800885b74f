"""Versions that travel as deltas: what a fold writes is, bit for bit, what whoever adds the deltas arrives at.

A chain of rounds: `exact` is what the versions would be if nothing were ever left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor
from cortex_common.errors import PreconditionError
from cortex_common.security.encryption import ObjectKind
from cortex_common.tensors import Arena, Manifest, TensorKind, chunk_ranges, model_sha256
from services.aggregator.batches import BatchProcessor, FoldPlan, FoldResult, FoldTargets
from services.aggregator.deltas import delta_header
from services.aggregator.states import StatePlan, check_state, state_header
from services.aggregator.strategies import create_strategy
from tests.unit.dataplane.test_fold import CRYPT, Memory

MANIFEST = Manifest.of([("w", (1500,), TensorKind.TRAINABLE), ("n", (2,), TensorKind.COUNTER)])
LOSSY = ("bf16", "int8", "int4", "topk")
DIGEST = "d" * 64


@dataclass
class Chain:
    """A job's versions, one after the other; `held` is what a worker has that only ever added deltas."""

    strategy: str = "fedavg"
    options: str = "{}"
    codec: str = "int4"
    number: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        first = Arena(rng.standard_normal(1500).astype(np.float32), np.zeros(2, np.int64))
        self.version = Memory(MANIFEST, first)
        self.held, self.state = first, None
        self.exact = first.values.astype(np.float64)

    def round(self, update: Arena, codec: str | None = None) -> FoldResult:
        """Fold one update into the next version, as a delta in this codec."""
        strategy = create_strategy(self.strategy, self.options)
        target = Memory(MANIFEST)
        self.number += 1
        header = replace(target.header, kind=ObjectKind.MODEL, round=self.number).fresh()
        compressor = WeightCompressor.create(codec or self.codec)
        delta = delta_header(header, DIGEST, compressor)
        kept = state_header(header, strategy, has_residual=delta is not None)
        plan = StatePlan(kept, self.state) if kept or self.state else None
        target.header, outputs = header, [Memory(MANIFEST), Memory(MANIFEST)]
        processor = BatchProcessor(self.threads)
        try:
            result = processor.fold(
                FoldPlan(MANIFEST, self.version, [Memory(MANIFEST, update)], [1.0], strategy, header, plan, delta),
                CRYPT,
                FoldTargets(target, *outputs),  # type: ignore[arg-type]
            )
        finally:
            processor.close()
        self.state = None
        if kept is not None:
            self.state, outputs[0].header = outputs[0], kept
        self.version = target
        if delta is None:
            assert not outputs[1].chunks
            self.held = target.decoded(MANIFEST)
        else:
            outputs[1].header = delta
            self._add(outputs[1], compressor)
        return result

    def _add(self, delta: Memory, codec: WeightCompressor) -> None:
        opener = CRYPT.opener(delta.header)
        for part in chunk_ranges(1500, 2, 256):
            plain = opener.open(part.index, delta.chunks[part.index])
            if part.is_counters:
                self.held.counters[:] = codec.decode_counters(plain, 2)
            else:
                codec.decode_add(plain, self.held.values[part.start : part.stop], 1.0)

    @property
    def stored(self) -> Arena:
        return self.version.decoded(MANIFEST)


def update_of(seed: int, scale: float = 0.1) -> Arena:
    rng = np.random.default_rng(seed)
    return Arena((scale * rng.standard_normal(1500)).astype(np.float32), rng.integers(0, 99, 2))


@pytest.mark.parametrize("strategy", ["fedavg", "diloco", "fedadam"])
@pytest.mark.parametrize("codec", LOSSY)
def test_who_adds_the_deltas_holds_the_version_bit_for_bit(codec: str, strategy: str) -> None:
    chain = Chain(strategy, codec=codec)
    for seed in range(4):
        result = chain.round(update_of(seed))
        assert chain.held.values.tobytes() == chain.stored.values.tobytes()
        assert np.array_equal(chain.held.counters, chain.stored.counters)
        assert result.header.model_sha256 == model_sha256(MANIFEST, chain.held)


@pytest.mark.parametrize("codec", LOSSY)
@settings(max_examples=10, deadline=None)
@given(rounds=st.lists(st.sampled_from(["delta", "exact"]), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_what_a_delta_leaves_out_comes_later_and_an_exact_round_leaves_out_nothing(
    codec: str, rounds: list[str], seed: int
) -> None:
    chain = Chain(codec=codec)
    for number, kind in enumerate([*rounds, "exact"]):
        update = update_of(seed + number)
        chain.exact += update.values
        chain.round(update, "none" if kind == "exact" else None)
        if kind == "exact":
            # One float32 rounding a round; a delta's own error would be thousands of times that.
            np.testing.assert_allclose(chain.stored.values, chain.exact, rtol=0, atol=4e-6)
            assert chain.state is None, "nothing is left to keep"


def test_the_error_does_not_grow_with_the_rounds() -> None:
    """Of int4 it stays that of one delta: without the residual it would grow like the root of their number."""
    chain, errors = Chain(codec="int4"), []
    for number in range(40):
        update = update_of(number)
        chain.exact += update.values
        chain.round(update)
        errors.append(float(np.abs(chain.stored.values - chain.exact).max()))
    assert max(errors[20:]) < 1.5 * max(errors[:10])
    assert max(errors) < 0.1 * 4 / 7, "half a step of the largest change in a block, and the residual's share"


def test_an_outer_state_is_kept_beside_the_residual_and_without_it() -> None:
    exact, mixed = Chain("diloco"), Chain("diloco", codec="bf16")
    for number in range(6):
        update = update_of(number)
        exact.round(update, "none")
        mixed.round(update, "none" if number % 3 == 2 else None)
    np.testing.assert_allclose(mixed.stored.values, exact.stored.values, rtol=0, atol=2e-6)


def test_the_same_fold_made_again_gives_the_same_delta_on_any_number_of_threads() -> None:
    digests = set()
    for threads in (1, 3):
        chain = Chain(codec="int4", threads=threads)
        digests |= {tuple(chain.round(update_of(seed)).header.model_sha256 for seed in range(3))}
    assert len(digests) == 1


def test_an_overflow_is_refused_as_it_is_without_a_delta() -> None:
    chain = Chain(codec="int8", options='{"server_learning_rate": 1e38}')
    with pytest.raises(PreconditionError, match="not finite"):
        chain.round(update_of(1, scale=1e3))


def test_strategy_and_options_are_those_of_the_base_with_and_without_a_residual() -> None:
    header = replace(Memory(MANIFEST).header, kind=ObjectKind.MODEL)
    fedavg, diloco = create_strategy("fedavg", "{}"), create_strategy("diloco", "{}")
    alone = state_header(header, fedavg, has_residual=True)
    beside = state_header(header, diloco, has_residual=True)
    check_state(header, alone, fedavg, 256)
    check_state(header, beside, diloco, 256)
    with pytest.raises(PreconditionError, match="no outer state"):
        check_state(header, alone, diloco, 256)
    with pytest.raises(PreconditionError, match='"strategy":"diloco"'):
        check_state(header, beside, create_strategy("fedavg", "{}"), 256)
