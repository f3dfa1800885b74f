"""ValidationManager."""

from __future__ import annotations

import numpy as np
import pytest

from cortex_common.codec import WeightCompressor
from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors import Arena, ChunkRange, Manifest, ManifestLimits, TensorKind, model_sha256
from cortex_common.validation import ValidationManager, l2_norm

MANIFEST = Manifest.of([("w", (2, 2), TensorKind.TRAINABLE)])
CHECK = ValidationManager()


def test_layouts_that_differ_are_told_apart_by_tensor() -> None:
    CHECK.check_same_layout(MANIFEST, MANIFEST)
    with pytest.raises(InvalidArgumentError, match=r"'w'.*where.*'w'"):
        CHECK.check_same_layout(Manifest.of([("w", (4,), TensorKind.TRAINABLE)]), MANIFEST)
    longer = Manifest.of([("w", (2, 2), TensorKind.TRAINABLE), ("b", (1,), TensorKind.TRAINABLE)])
    with pytest.raises(InvalidArgumentError, match="2 tensors given where 1"):
        CHECK.check_same_layout(longer, MANIFEST)
    with pytest.raises(InvalidArgumentError, match="at most 8"):
        ValidationManager(ManifestLimits(max_model_bytes=8)).read_manifest(MANIFEST.to_json())


def test_updates_must_be_finite_and_bounded() -> None:
    delta = np.array([3, 4, 0, 0], np.float32)
    assert CHECK.check_update(delta) == l2_norm(delta) == 5.0
    with pytest.raises(InvalidArgumentError, match="norm 5; at most 4"):
        ValidationManager(max_norm=4).check_update(delta)
    with pytest.raises(InvalidArgumentError, match="NaN"):
        CHECK.check_update(np.array([np.nan], np.float32))


def test_norms_do_not_overflow_and_equal_numpys() -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    assert l2_norm(values) == pytest.approx(float(np.linalg.norm(values.astype(np.float64))), rel=1e-12)
    assert l2_norm(np.full(10, 3e38, np.float32)) == pytest.approx(3e38 * 10**0.5)


def test_models_must_fit_and_have_their_digest() -> None:
    arena = Arena.zeros(MANIFEST)
    CHECK.check_model(MANIFEST, arena, model_sha256(MANIFEST, arena))
    with pytest.raises(InvalidArgumentError, match="digest"):
        CHECK.check_model(MANIFEST, arena, "0" * 64)
    arena.values[0] = np.inf
    with pytest.raises(InvalidArgumentError, match="model holds NaN or infinite"):
        CHECK.check_model(MANIFEST, arena)
    with pytest.raises(InvalidArgumentError, match="arena of 3 elements"):
        CHECK.check_model(MANIFEST, Arena(np.zeros(3, np.float32), np.zeros(0, np.int64)))


def test_payload_errors_name_chunk_and_elements() -> None:
    payload = np.array([1, np.nan], np.float32).tobytes() + b"\0"
    with pytest.raises(InvalidArgumentError, match=r"chunk 3 \(elements 6 to 7\)"):
        CHECK.check_payload(WeightCompressor.create("none"), payload, ChunkRange(3, 6, 8))


def test_dataset_digests_tell_examples_order_types_and_shapes_apart() -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, 2])
    digests = {
        CHECK.dataset_sha256(x, y),
        CHECK.dataset_sha256(x[::-1], y),
        CHECK.dataset_sha256(x.astype(np.float64), y),
        CHECK.dataset_sha256(x.reshape(3, 1, 2), y),
        CHECK.dataset_sha256(x, y + 1),
    }
    assert len(digests) == 5
    assert CHECK.dataset_sha256(np.asfortranarray(x), y.astype(">i8")) in digests
    with pytest.raises(InvalidArgumentError, match="3 inputs and 2 targets"):
        CHECK.dataset_sha256(x, y[:2])
    with pytest.raises(InvalidArgumentError, match="NaN"):
        CHECK.dataset_sha256(x * np.nan, y)
    with pytest.raises(InvalidArgumentError, match="allowed are numbers"):
        CHECK.dataset_sha256(np.array([{}], object), y[:1])
