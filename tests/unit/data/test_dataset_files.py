"""Datasets from files: IDX, .npz and the catalogue that names them."""

from __future__ import annotations

import contextlib
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.data import available_datasets, load
from cortex_common.data.files import read_catalogue
from cortex_common.data.idx import idx_shape, read_idx
from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError, NotFoundError

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], np.uint8)
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, CODES[array.dtype.str[1:]], array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def catalogue(folder: Path, entries: dict[str, Any] | str) -> Path:
    path = folder / "catalogue.yaml"
    lines = "".join(f"  {name}: {value}\n" for name, value in entries.items()) if isinstance(entries, dict) else entries
    path.write_text(f"datasets:\n{lines}" if isinstance(entries, dict) else entries)
    return path


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_of_every_type_are_read(tmp_path: Path, kind: str, compressed: bool) -> None:
    array = IMAGES.astype(kind)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
    found = read_idx(path)
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype
    assert idx_shape(path) == array.shape


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not an IDX file"),
        (b"PNG....", "not an IDX file"),
        (b"\0\0\x08\x05", "not an IDX file"),
        (idx_bytes(IMAGES)[:9], "ends within its header"),
        (idx_bytes(IMAGES)[:-1], "only 59 bytes"),
        (idx_bytes(IMAGES) + b"x", "more bytes"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], "cannot be read|only"),
        (b"\x1f\x8b" + b"\0" * 20, "cannot be read"),
        (b"\0\0\x0e\x04" + b"\xff" * 16, "allowed are"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=named) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_break_the_idx_reader(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    with contextlib.suppress(CortexError):
        read_idx(path)


def test_an_npz_of_floats_is_taken_as_it_is(tmp_path: Path) -> None:
    x, y = np.linspace(-3, 3, 40).reshape(10, 4), np.arange(10) % 3
    np.savez_compressed(tmp_path / "d.npz", x=x, y=y)
    path = catalogue(tmp_path, {"mine": "{npz: d.npz}"})
    dataset = load("mine", tmp_path, path)
    inputs, labels = dataset.take(np.array([3, 1]))
    assert inputs.dtype == np.float32
    assert np.array_equal(inputs, x[[3, 1]].astype(np.float32))
    assert labels.tolist() == [0, 1]
    assert (dataset.info.input_shape, dataset.info.classes, dataset.info.examples) == ((4,), 3, 10)


def test_an_idx_pair_of_bytes_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "y").write_bytes(idx_bytes(LABELS))
    path = catalogue(tmp_path, {"mine": "{x: x, y: y, classes: 12}"})
    dataset = load("mine", tmp_path, path)
    inputs, _ = dataset.take(slice(0, 3))
    assert np.allclose(inputs, IMAGES / 255)
    assert dataset.info.classes == 12
    assert [info for info in available_datasets(tmp_path, path) if info.name == "mine"] == [dataset.info]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 2)), y=np.arange(4))
    path = catalogue(tmp_path, {"mine": "{npz: d.npz}"})
    assert read_catalogue(path)["mine"].info().examples == 4
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 2)), y=np.arange(5))
    assert read_catalogue(path)["mine"].info().examples == 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("datasets: [", "not YAML"),
        ("data: {}", "one key, datasets"),
        ("- a", "one key, datasets"),
        ("datasets: {digits: {npz: a.npz}}", "built in"),
        ("datasets: {'Bad Name': {npz: a.npz}}", "bad name"),
        ("datasets: {a: {npz: 3}}", "allowed: a path"),
        ("datasets: {a: {x: f}}", "npz: FILE"),
        ("datasets: {a: {npz: f, y: g}}", "npz: FILE"),
        ("datasets: {a: b.npz}", "npz: FILE"),
        ("datasets: {a: {npz: f, classes: none}}", "whole number"),
    ],
)
def test_a_bad_catalogue_is_one_clear_error(tmp_path: Path, text: str, named: str) -> None:
    path = catalogue(tmp_path, text)
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        available_datasets(tmp_path, path)
    assert str(path) in str(caught.value)


def test_a_catalogue_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="No such file"):
        available_datasets(tmp_path, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"x": np.zeros((4, 2))}, "needed are x and y"),
        ({"x": np.zeros(4), "y": np.arange(4)}, r"allowed: \(N, ...\)"),
        ({"x": np.zeros((4, 2)), "y": np.arange(3)}, "one for each x"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4)}, "whole numbers"),
        ({"x": np.zeros((4, 2)), "y": np.arange(4) - 1}, "labels from -1"),
        ({"x": np.array([["a"]]), "y": np.arange(1)}, "not an array of numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_named_with_their_entry(tmp_path: Path, arrays: dict[str, Any], named: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    path = catalogue(tmp_path, {"mine": "{npz: d.npz}"})
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        load("mine", tmp_path, path)
    assert f"{path}: mine" in str(caught.value)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object), y=np.arange(1))
    path = catalogue(tmp_path, {"mine": "{npz: d.npz}"})
    with pytest.raises(InvalidArgumentError, match=r"cannot be read|not an array of numbers"):
        load("mine", tmp_path, path)


def test_a_missing_or_truncated_npz_is_named(tmp_path: Path) -> None:
    path = catalogue(tmp_path, {"mine": "{npz: d.npz}"})
    with pytest.raises(InvalidArgumentError, match=r"d\.npz: No such file"):
        load("mine", tmp_path, path)
    np.savez(tmp_path / "d.npz", x=np.zeros((100, 20)), y=np.arange(100))
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        load("mine", tmp_path, path)


def test_an_unknown_dataset_lists_what_is_here(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'cats' is not on this node; here are: digits, digits-test"):
        load("cats", tmp_path)


def test_no_damage_in_a_compressed_npz_is_anything_but_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.arange(200.0).reshape(50, 4), y=np.arange(50))
    listed, whole = catalogue(tmp_path, {"mine": "{npz: d.npz}"}), path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load("mine", tmp_path, listed)
        except InvalidArgumentError as error:
            refused += str(path) in error.message
    assert refused > len(whole) / 2
