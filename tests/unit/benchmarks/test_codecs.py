"""What the table of codecs calls numpy is numpy, and what it calls numba is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import codecs
from benchmarks.codecs import CASES, Bench, Engine, measure, rooms_for, run_apart, steps_of
from benchmarks.network import BenchmarkError
from cortex_common.codec import WeightCompressor, warm_up
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS


@pytest.fixture
def compiled() -> None:
    """This process has compiled kernels, as after a benchmark that loads them."""
    pytest.importorskip("numba")
    assert warm_up(WeightCompressor.create("int8")).compiled == ("int8",)


@pytest.mark.usefixtures("compiled")
def test_numpy_is_not_measured_where_codecs_run_compiled() -> None:
    with pytest.raises(BenchmarkError, match=r"kernels are ready for .*int8"):
        next(measure(Bench(DEFAULT_CHUNK_ELEMENTS, repeat=1), Engine.NUMPY))


@pytest.mark.usefixtures("compiled")
def test_numpy_is_measured_after_other_benchmarks_have_compiled(tmp_path: Path) -> None:
    run_apart(tmp_path / "codecs.json", elements=DEFAULT_CHUNK_ELEMENTS, repeat=1)
    result = json.loads((tmp_path / "codecs.json").read_text())
    assert [row["engine"] for row in result["codecs"]] == ["numpy"] * len(CASES) + ["numba"] * len(CASES)
    assert codecs.table(result).count("| numpy |") == len(CASES)


def test_a_failed_measurement_is_told(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="could not be measured"):
        run_apart(tmp_path / "codecs.json", repeat=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_chunk_has_memory_of_its_own_at_both_ends(name: str, options: dict[str, object]) -> None:
    bench, codec = Bench(2 * DEFAULT_CHUNK_ELEMENTS, repeat=1), WeightCompressor.create(name, options)
    rooms = rooms_for(bench, codec)
    payloads = [codec.encode_into(bench.of(part), rooms[part.index], seed=part.index) for part in bench.parts]
    for step in steps_of(bench, codec, rooms, payloads).values():
        bench.speed(step)
    for part in bench.parts:
        expected_n = codec.decode(codec.encode(bench.of(part), seed=part.index), part.elements)
        np.testing.assert_array_equal(bench.out(part), expected_n)
        assert np.frombuffer(rooms[part.index], np.uint8).ctypes.data % 8 == 0


def test_the_vector_is_larger_than_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("48K", "2048K", "480M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr("benchmarks.machine._CACHES", tmp_path)
    assert 4 * codecs.uncached_elements() == 2 * 480 * 2**20
    monkeypatch.setattr("benchmarks.machine._CACHES", tmp_path / "untold")
    assert 4 * codecs.uncached_elements() == 256 * 2**20
