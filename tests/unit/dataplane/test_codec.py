"""WeightCompressor: round trips, bounds, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cortex_common.codec import CODECS, WeightCompressor
from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.tensors import ChunkRange

TINY = float(np.finfo(np.float32).tiny)
MAX = float(np.finfo(np.float32).max)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = st.integers(0, 700).flatmap(lambda n: arrays(np.float32, n, elements=finite, fill=finite))
VARIANTS: list[tuple[str, dict]] = [
    ("none", {}),
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"block": 16, "stochastic": True}),
    ("int8", {"block": 65536}),
    ("int4", {}),
    ("int4", {"block": 16, "stochastic": True}),
    ("topk", {}),
    ("topk", {"density": 0.3, "values": "fp32"}),
    ("topk", {"density": 0.5, "stochastic": True}),
]
codecs = st.sampled_from(VARIANTS).flatmap(
    lambda pair: st.sampled_from([WeightCompressor.create(*pair, lz4=mode) for mode in ("auto", "on", "off")])
)


def bounds(codec: WeightCompressor, values_n: np.ndarray) -> np.ndarray:
    """The largest error allowed for each value, worked out from the definition of the format."""
    exact = np.abs(values_n.astype(np.float64))
    if codec.codec == "none":
        return np.zeros(exact.size)
    if codec.codec == "bf16":
        return np.where(exact > 0.995 * MAX, exact / 128, exact / 256 * 1.0001 + 2**-133)
    options = codec.quantiser.options()
    levels = 127 if codec.codec == "int8" else 7
    steps = 1.0001 if options["stochastic"] else 0.5001
    bound = np.empty(exact.size)
    for start in range(0, exact.size, int(options["block"])):
        block = slice(start, start + int(options["block"]))
        absmax = exact[block].max()
        # Where the largest float is rounded down to stay finite, half a step more.
        bound[block] = absmax / levels * (steps if absmax < 0.8 * MAX else steps + 1) + levels * TINY
    return bound


@given(codecs.filter(lambda codec: codec.codec != "topk"), values, st.integers(0, 2**64))
def test_what_is_decoded_is_as_near_as_promised(codec: WeightCompressor, values_n: np.ndarray, seed: int) -> None:
    payload = codec.encode(values_n, seed=seed)
    decoded = codec.decode(payload, values_n.size)
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - values_n) <= bounds(codec, values_n)).all()
    if not codec.quantiser.lossy:
        assert decoded.tobytes() == values_n.tobytes()


@given(codecs, values, st.integers(0, 2**64))
def test_a_payload_passes_its_check_and_has_the_length_known_in_advance(
    codec: WeightCompressor, values_n: np.ndarray, seed: int
) -> None:
    payload = codec.encode(values_n, seed=seed)
    part = ChunkRange(0, 0, values_n.size)
    codec.check(payload, part)
    assert len(payload) <= codec.max_payload_bytes(part)
    if codec.lz4 == "off":
        assert len(payload) == codec.max_payload_bytes(part)


@given(codecs, values, st.integers(0, 2**64))
def test_the_residual_is_what_the_receiver_lacks(codec: WeightCompressor, values_n: np.ndarray, seed: int) -> None:
    residual_n = np.full_like(values_n, np.nan)
    payload = codec.encode(values_n, seed=seed, residual_n=residual_n)
    assert bytes(payload) == bytes(codec.encode(values_n, seed=seed))
    want = values_n - codec.decode(payload, values_n.size)
    assert np.array_equal(residual_n, want)
    in_place = values_n.copy()
    assert codec.encode(in_place, seed=seed, residual_n=in_place) == payload
    assert in_place.tobytes() == residual_n.tobytes()


@given(codecs, values)
def test_encoding_into_given_memory_gives_the_same_payload(codec: WeightCompressor, values_n: np.ndarray) -> None:
    room = bytearray(b"x" * (codec.max_payload_bytes(ChunkRange(0, 0, values_n.size)) + 7))
    want = bytes(codec.encode(values_n, seed=3))
    assert bytes(codec.encode_into(values_n, room, seed=3)) == want
    with pytest.raises(InvalidArgumentError, match="of room for a payload"):
        codec.encode_into(values_n, room[:-8])
    with pytest.raises(InvalidArgumentError, match="residual of"):
        codec.encode(values_n, residual_n=np.empty(values_n.size + 1, np.float32))


@given(codecs, values, st.floats(0.01, 1e6))
def test_decoding_into_a_sum_equals_decoding_and_adding(
    codec: WeightCompressor, values_n: np.ndarray, weight: float
) -> None:
    payload = codec.encode(values_n)
    for dtype in (np.float64, np.float32):
        total = np.arange(values_n.size).astype(dtype)
        with np.errstate(over="ignore"):
            want = (total + weight * codec.decode(payload, values_n.size).astype(np.float64)).astype(dtype)
            codec.decode_add(payload, total, weight)
        assert np.array_equal(total, want)


@given(codecs, st.integers(0, 60), st.data())
def test_any_bytes_are_decoded_to_finite_values_or_refused(
    codec: WeightCompressor, elements: int, data: st.DataObject
) -> None:
    length = codec.max_payload_bytes(ChunkRange(0, 0, elements))
    for payload in (
        data.draw(st.binary(max_size=200)),
        data.draw(st.binary(min_size=length - 1, max_size=length - 1)) + b"\0",
    ):
        try:
            decoded = codec.decode(payload, elements)
        except (CorruptError, InvalidArgumentError):
            continue
        assert decoded.size == elements
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 255, 256, 69_999])
def test_values_that_are_not_finite_are_refused_wherever_they_are(codec: str, bad: float, place: int) -> None:
    values_n = np.ones(70_000, np.float32)
    values_n[place] = bad
    with pytest.raises(InvalidArgumentError, match="NaN or infinite"):
        WeightCompressor.create(codec).encode(values_n)


def test_int8_is_four_times_smaller_and_handles_pieces_and_tails() -> None:
    codec = WeightCompressor.create("int8")
    values_n = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    payload = codec.encode(values_n)
    assert len(payload) == 200_001 + 4 * 782 + 1
    assert np.abs(codec.decode(payload, 200_001) - values_n).max() < 5.5 / 254


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("spread", [1e-45, 1e-38, 1e-30, 1.0, 3.4e38])
def test_nothing_overflows_at_either_end(name: str, spread: float) -> None:
    codec = WeightCompressor.create(name)
    values_n = np.linspace(-spread, spread, 1000).astype(np.float32)
    decoded = codec.decode(codec.encode(values_n), 1000)
    assert (np.abs(decoded.astype(np.float64) - values_n) <= bounds(codec, values_n)).all()


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4"])
def test_lz4_is_used_only_where_it_helps(codec: str) -> None:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random(100_000) < 0.01, rng.standard_normal(100_000), 0).astype(np.float32)
    dense = rng.standard_normal(100_000).astype(np.float32)
    automatic, never = WeightCompressor.create(codec), WeightCompressor.create(codec, lz4="off")
    assert len(automatic.encode(sparse)) * 5 < len(never.encode(sparse))
    assert automatic.encode(dense) == never.encode(dense)
    assert (
        never.decode(automatic.encode(sparse), sparse.size).tobytes()
        == never.decode(never.encode(sparse), sparse.size).tobytes()
    )


def test_a_packed_bomb_is_refused_before_it_is_unpacked() -> None:
    import lz4.block

    bomb = lz4.block.compress(b"\0" * 50_000_000, store_size=False) + b"\1"
    with pytest.raises(CorruptError, match="does not unpack to the 4000 bytes"):
        WeightCompressor.create("none").decode(bomb[:3000] + b"\1", 1000)
    with pytest.raises(CorruptError, match="payload of"):
        WeightCompressor.create("none").decode(bomb, 1000)


@pytest.mark.parametrize("counters", [[], [0], [-(2**63), 2**63 - 1, 5]])
def test_counters_travel_exactly(counters: list[int]) -> None:
    codec = WeightCompressor.create("int8")
    payload = codec.encode_counters(np.array(counters, np.int64))
    assert codec.decode_counters(payload, len(counters)).tolist() == counters
    with pytest.raises(CorruptError):
        codec.decode_counters(payload, len(counters) + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zip", {}), "codec 'zip'; allowed are none, bf16, int8, int4, topk"),
        (("int8", {"block": 100}), "power of two"),
        (("int8", {"block": True}), "power of two"),
        (("int8", {"blok": 256}), "blok: unknown option"),
        (("none", {"block": 256}), "block: unknown option"),
        (("none", {}, "maybe"), "lz4 'maybe'; allowed are auto, on, off"),
    ],
)
def test_what_a_codec_does_not_know_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        WeightCompressor.create(*arguments)


@pytest.mark.parametrize("text", ["[]", "{", '{"block": 3}', "[" * 5000])
def test_bad_options_in_a_header_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        WeightCompressor.from_wire("int8", text)


def test_the_wire_form_is_canonical() -> None:
    codec = WeightCompressor.create("int8", {"block": 64})
    assert codec.options_json == '{"block":64,"stochastic":false}'
    assert WeightCompressor.from_wire("int8", codec.options_json).quantiser == codec.quantiser
    assert WeightCompressor.from_wire("int8", "").options_json == '{"block":256,"stochastic":false}'
