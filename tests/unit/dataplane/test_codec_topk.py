"""Top-k: the right values are picked, lengths are fixed, places are checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError
from cortex_common.tensors import ChunkRange

SEGMENT = 4096
sizes = st.sampled_from([0, 1, 2, 50, 4095, 4096, 4097, 9000, 70_001])


def reference(values_n: np.ndarray, density: float) -> np.ndarray:
    """The largest magnitudes of each segment, the first of equals: by a stable sort."""
    kept = np.zeros_like(values_n)
    for start in range(0, values_n.size, SEGMENT):
        segment = values_n[start : start + SEGMENT]
        count = min(max(int(density * segment.size + 0.5), 1), segment.size)
        picked = np.argsort(-np.abs(segment), kind="stable")[:count]
        kept[start + picked] = segment[picked]
    return kept


@given(sizes, st.floats(0.0005, 0.5), st.sampled_from(["normal", "few values", "sparse", "zero", "tiny"]))
def test_exactly_the_largest_of_each_segment_arrive(elements: int, density: float, kind: str) -> None:
    rng = np.random.default_rng(elements)
    normal = rng.standard_normal(elements).astype(np.float32)
    values_n = {
        "normal": normal,
        "few values": np.round(normal),
        "sparse": np.where(rng.random(elements) < 0.001, normal, 0).astype(np.float32),
        "zero": np.zeros(elements, np.float32),
        "tiny": normal * np.float32(1e-42),
    }[kind]
    codec = WeightCompressor.create("topk", {"density": density, "values": "fp32"})
    residual_n = np.empty_like(values_n)
    decoded = codec.decode(codec.encode(values_n, residual_n=residual_n), elements)
    assert np.array_equal(decoded, reference(values_n, density))
    assert np.array_equal(decoded + residual_n, values_n)


@given(sizes, st.floats(0.0005, 0.5), st.booleans())
def test_int8_values_are_near_and_the_rest_is_untouched(elements: int, density: float, stochastic: bool) -> None:
    values_n = np.random.default_rng(elements).standard_normal(elements).astype(np.float32)
    codec = WeightCompressor.create("topk", {"density": density, "stochastic": stochastic})
    decoded = codec.decode(codec.encode(values_n, seed=1), elements)
    want = reference(values_n, density)
    assert np.abs(decoded - want).max(initial=0) <= np.abs(want).max(initial=0) / (127 if stochastic else 254) * 1.001
    assert not decoded[want == 0].any()


def test_a_chunk_of_one_percent_is_a_hundred_and_fifty_times_smaller() -> None:
    values_n = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    assert values_n.nbytes / len(WeightCompressor.create("topk").encode(values_n)) > 150


def body(elements: int, places: list[int]) -> bytes:
    """A payload with values 1.0 at these places, written from the description of the format."""
    lower = bytes(place & 255 for place in places)
    half = (len(places) + 1) // 2
    upper = bytes(places[j] >> 8 | (places[half + j] >> 8 << 4 if half + j < len(places) else 0) for j in range(half))
    return np.ones(len(places), np.float32).tobytes() + lower + upper + b"\0"


def test_the_format_is_as_described() -> None:
    codec = WeightCompressor.create("topk", {"density": 0.0005, "values": "fp32"}, lz4="off")
    values_n = np.zeros(SEGMENT + 100, np.float32)
    values_n[[5, 4000, SEGMENT + 99]] = 1
    payload = body(values_n.size, [5, 4000, 99])
    assert bytes(codec.encode(values_n)) == payload
    assert np.array_equal(codec.decode(payload, values_n.size), values_n)


@pytest.mark.parametrize(
    ("places", "message"),
    [([5, 5, 0], "do not ascend"), ([9, 5, 0], "do not ascend"), ([1, 2, 100], "beyond"), ([1, 2, 4095], "beyond")],
)
def test_places_that_make_no_sense_are_refused(places: list[int], message: str) -> None:
    codec = WeightCompressor.create("topk", {"density": 0.0005, "values": "fp32"})
    with pytest.raises(CorruptError, match=message):
        codec.check(body(SEGMENT + 100, places), ChunkRange(0, 0, SEGMENT + 100))
    with pytest.raises(CorruptError, match=message):
        codec.decode_add(body(SEGMENT + 100, places), np.zeros(SEGMENT + 100), 1.0)
