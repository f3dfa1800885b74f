"""Compiled and numpy code give the same bytes, and warming up only ever adopts what does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor, native, warm_up
from cortex_common.codec.kernels import Kernels
from cortex_common.codec.quantisers import Quantiser
from cortex_common.codec.rounding import Rounding
from cortex_common.errors import InvalidArgumentError

VARIANTS = [
    ("none", {}),
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"stochastic": True}),
    ("int4", {}),
    ("int4", {"stochastic": True}),
    ("topk", {}),
    ("topk", {"density": 0.2, "stochastic": True}),
    ("topk", {"density": 0.2, "values": "fp32"}),
]
_compiled: dict[object, Kernels] = {}


def kernels_of(quantiser: Quantiser) -> Kernels:
    pytest.importorskip("numba")
    if quantiser.key not in _compiled:
        _compiled[quantiser.key] = native.compile_all(quantiser.recipes())
    return _compiled[quantiser.key]


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    held = dict(native._READY)
    native._READY.clear()
    yield
    native._READY.clear()
    native._READY.update(held)


def hard_numbers(elements: int, seed: int, spread: float) -> np.ndarray:
    """From denormal to huge, with zeros, equal numbers, and numbers half-way between two steps."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        values_n = (rng.standard_normal(elements) * 10.0 ** rng.uniform(-spread, spread, elements)).astype(np.float32)
        ties = rng.random(elements) < 0.2
        values_n[ties] = np.round(values_n[ties] * 2) / 2
    values_n[rng.random(elements) < 0.1] = 0
    return np.clip(values_n, -np.finfo(np.float32).max, np.finfo(np.float32).max)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(VARIANTS),
    st.sampled_from([0, 1, 127, 256, 257, 4096, 5000, 66_000]),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 1.0, 38.0, 45.0]),
)
def test_compiled_code_gives_the_same_bytes_as_numpy(
    variant: tuple[str, dict], elements: int, seed: int, spread: float
) -> None:
    quantiser = WeightCompressor.create(*variant).quantiser
    compiled = kernels_of(quantiser)
    values_n = hard_numbers(elements, seed, spread)
    rounding = Rounding.of(seed, is_stochastic=quantiser.stochastic)
    bodies, residuals, decoded, totals = [], [], [], []
    for kernels in (None, compiled):
        body = bytearray(quantiser.body_bytes(elements))
        residual_n = np.empty_like(values_n)
        quantiser.encode(values_n, memoryview(body), rounding, residual_n, kernels)
        view = memoryview(bytes(body))  # read-only, as lz4 gives it
        quantiser.check(view, elements, kernels)
        out_n = np.empty_like(values_n)
        quantiser.decode(view, out_n, kernels)
        total_n = np.linspace(-1, 1, elements)
        narrow_n = np.linspace(-1, 1, elements, dtype=np.float32)
        with np.errstate(over="ignore"):
            quantiser.add(view, total_n, 1.3, kernels)
            quantiser.add(view, narrow_n, 1.3, kernels)
        in_place = values_n.copy()
        quantiser.encode(in_place, memoryview(bytearray(len(body))), rounding, in_place, kernels)
        assert in_place.tobytes() == residual_n.tobytes()
        bodies.append(bytes(body))
        residuals.append(residual_n.tobytes())
        decoded.append(out_n.tobytes())
        totals.append((total_n.tobytes(), narrow_n.tobytes()))
    assert bodies[0] == bodies[1]
    assert residuals[0] == residuals[1]
    assert decoded[0] == decoded[1]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("name", ["none", "bf16", "int8", "int4", "topk"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4095, 4999])
def test_compiled_code_refuses_what_is_not_finite(name: str, bad: float, place: int) -> None:
    quantiser = WeightCompressor.create(name).quantiser
    values_n = np.ones(5000, np.float32)
    values_n[place] = bad
    body = memoryview(bytearray(quantiser.body_bytes(5000)))
    with pytest.raises(InvalidArgumentError, match="NaN or infinite"):
        quantiser.encode(values_n, body, Rounding.of(0, is_stochastic=False), values_n, kernels_of(quantiser))


@pytest.mark.parametrize("name", ["none", "bf16"])
@pytest.mark.parametrize("place", [0, 4999])
def test_a_received_body_that_is_not_finite_is_refused(name: str, place: int) -> None:
    quantiser = WeightCompressor.create(name).quantiser
    words = np.ones(5000, np.float32 if name == "none" else np.uint16)
    words[place] = np.nan if name == "none" else 0xFF80
    for kernels in (None, kernels_of(quantiser)):
        with pytest.raises(InvalidArgumentError, match="NaN or infinite"):
            quantiser.check(memoryview(words.tobytes()), 5000, kernels)


def test_memory_that_is_not_aligned_or_in_order_goes_the_numpy_way() -> None:
    quantiser = WeightCompressor.create("int8").quantiser
    values_n = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    body = bytearray(quantiser.body_bytes(1024))
    plain = Rounding.of(0, is_stochastic=False)
    quantiser.encode(values_n[::2], memoryview(body), plain, np.empty(0, np.float32), kernels_of(quantiser))
    odd = memoryview(bytearray(b"x" + body))[1:]
    out_n = np.empty(1024, np.float32)
    quantiser.decode(odd, out_n, kernels_of(quantiser))
    assert np.abs(out_n - values_n[::2]).max() < 5 / 254


def test_warming_up_adopts_the_kernels_and_changes_no_byte(fresh_registry: None) -> None:
    pytest.importorskip("numba")
    codec = WeightCompressor.create("int8")
    values_n = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    before = codec.encode(values_n)
    assert native.ready(codec.quantiser.key) is None
    report = warm_up(codec)
    assert report.compiled == ("int8",)
    assert not report.refused
    assert native.ready(codec.quantiser.key) is not None
    assert codec.encode(values_n) == before


def test_a_kernel_that_differs_is_not_adopted(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = WeightCompressor.create("none")
    wrong: Kernels = {
        "encode": lambda bits, out: out.fill(1) or np.uint32(0),
        "largest": lambda bits: np.uint32(0),
        "add": lambda values, total, weight: None,
    }
    monkeypatch.setattr("cortex_common.codec.warming.compile_all", lambda recipes: wrong)
    report = warm_up(codec)
    assert report.compiled == ()
    assert "other bytes than numpy" in report.refused["none"]
    assert native.ready(codec.quantiser.key) is None


def test_importing_the_codecs_does_not_import_numba_and_without_it_numpy_does_the_work() -> None:
    script = (
        "import sys, numpy as np\n"
        "from cortex_common.codec import WeightCompressor, warm_up\n"
        "assert 'numba' not in sys.modules\n"
        "sys.modules['numba'] = None\n"
        "report = warm_up(WeightCompressor.create('int8'))\n"
        "assert not report.compiled and 'ModuleNotFoundError' in report.refused['int8'], report\n"
        "assert len(WeightCompressor.create('int8').encode(np.ones(256, np.float32))) < 300\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
