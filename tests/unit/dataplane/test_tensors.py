"""The flat model: layout, chunks, digest, safetensors."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors import (
    Arena,
    FileLimits,
    Manifest,
    ManifestLimits,
    ModelDigest,
    TensorKind,
    chunk_count,
    chunk_ranges,
    model_sha256,
    read_safetensors,
    safetensors_parts,
    write_safetensors,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
layouts = st.dictionaries(
    st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=12),
    st.tuples(shapes, st.sampled_from(TensorKind)),
    min_size=1,
    max_size=8,
).map(lambda d: [(name, shape, kind) for name, (shape, kind) in d.items()])


def manifest_or_none(layout: list[tuple[str, tuple[int, ...], TensorKind]]) -> Manifest | None:
    if all(0 in shape for _, shape, _ in layout):
        with pytest.raises(InvalidArgumentError, match="holds no numbers"):
            Manifest.of(layout)
        return None
    return Manifest.of(layout)


def filled(manifest: Manifest) -> Arena:
    arena = Arena.zeros(manifest)
    arena.values[:] = np.arange(manifest.elements) - 3.5
    arena.counters[:] = np.arange(manifest.counters) * 10**12
    return arena


def file_of(manifest: Manifest, arena: Arena) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, manifest, arena)
    return file.getvalue()


@given(layouts)
def test_any_layout_survives_json_and_its_file_reads_the_same_everywhere(
    layout: list[tuple[str, tuple[int, ...], TensorKind]],
) -> None:
    manifest = manifest_or_none(layout)
    if manifest is None:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest
    arena = filled(manifest)
    data = file_of(manifest, arena)
    assert hashlib.sha256(data).hexdigest() == model_sha256(manifest, arena)
    assert len(data) == manifest.file_bytes
    ours, theirs = read_safetensors(data), safetensors.numpy.load(data)
    assert ours.keys() == theirs.keys() == arena.views(manifest).keys()
    for name, view in arena.views(manifest).items():
        np.testing.assert_array_equal(ours[name], view)
        np.testing.assert_array_equal(theirs[name], view)


def test_the_file_equals_the_one_the_safetensors_library_writes() -> None:
    manifest = Manifest.of([("a.bias", (3,), TensorKind.TRAINABLE), ("b.weight", (2, 3), TensorKind.TRAINABLE)])
    arena = filled(manifest)
    tensors = {name: torch.from_numpy(view.copy()) for name, view in arena.views(manifest).items()}
    assert file_of(manifest, arena) == safetensors.torch.save(tensors, metadata={"format": "pt"})


def test_torch_opens_a_file_whose_integers_follow_an_odd_number_of_floats(tmp_path: Path) -> None:
    manifest = Manifest.of([("w", (3,), TensorKind.TRAINABLE), ("steps", (), TensorKind.COUNTER)])
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(manifest, filled(manifest)))
    loaded = safetensors.torch.load_file(path)
    assert loaded["w"].tolist() == [-3.5, -2.5, -1.5]
    assert loaded["steps"].dtype is torch.int64


@given(st.integers(0, 5000), st.integers(0, 3), st.integers(256, 1000))
def test_chunks_cover_each_number_exactly_once(elements: int, counters: int, size: int) -> None:
    ranges = chunk_ranges(elements, counters, size)
    assert len(ranges) == chunk_count(elements, counters, size)
    assert [part.index for part in ranges] == list(range(len(ranges)))
    floats = [part for part in ranges if not part.is_counters]
    assert [index for part in floats for index in range(part.start, part.stop)] == list(range(elements))
    assert all(part.elements == size for part in floats[:-1])
    assert sum(part.elements for part in ranges if part.is_counters) == counters


def test_counting_the_chunks_of_a_terabyte_costs_nothing() -> None:
    assert chunk_count(10**12, 1, 1024) == 976562501


@pytest.mark.parametrize("size", [0, 1, 255, 1 << 20])
def test_chunk_sizes_that_cannot_travel_are_refused(size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="chunk_elements"):
        chunk_ranges(10, 0, size)


def tampered(**changes: object) -> bytes:
    entry = {"dtype": "F32", "kind": "trainable", "name": "w", "offset": 0, "shape": [2]} | changes
    return json.dumps({"tensors": [entry]}, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid"),
        (b"[]", "not valid"),
        (b"[" * 100_000, "not valid"),
        (tampered(shape=[-1]), "impossible"),
        (tampered(shape=[1 << 60]), "impossible"),
        (tampered(shape=[1 << 40, 1 << 40]), "more than"),
        (tampered(shape=[1.5]), "whole numbers"),
        (tampered(shape=[True]), "whole numbers"),
        (tampered(shape=[2] * 40), "impossible"),
        (tampered(offset=1), "without gap or overlap"),
        (tampered(dtype="I64"), "a trainable is F32"),
        (tampered(dtype="F64"), "a trainable is F32"),
        (tampered(kind="other"), "not valid"),
        (tampered(name=""), "tensor name"),
        (tampered(name="__metadata__"), "tensor name"),
        (tampered(name="a\x00b"), "control characters"),
        (tampered(name="x" * 600), "tensor name"),
        (tampered(extra=1), "exactly the keys"),
        (tampered(shape=[0]), "holds no numbers"),
        (tampered() + b" ", "canonical"),
        (tampered(shape=[1 << 39]), "bytes; at most"),
        (b" " * (1 << 21), "bytes; at most"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Manifest.from_json(text, ManifestLimits(max_model_bytes=1 << 32))


def test_a_name_may_stand_only_once() -> None:
    with pytest.raises(InvalidArgumentError, match="twice"):
        Manifest.of([("w", (1,), TensorKind.TRAINABLE), ("w", (1,), TensorKind.BUFFER)])


def test_views_write_to_the_arena() -> None:
    manifest = Manifest.of([("a", (2,), TensorKind.TRAINABLE), ("b", (2, 2), TensorKind.TRAINABLE)])
    arena = Arena.zeros(manifest)
    arena.views(manifest)["b"][1, 0] = 7
    assert arena.values.tolist() == [0, 0, 0, 0, 7, 0]


def test_a_digest_needs_all_numbers() -> None:
    manifest = Manifest.of([("a", (2,), TensorKind.TRAINABLE)])
    digest = ModelDigest(manifest)
    with pytest.raises(InvalidArgumentError, match="8 bytes too few"):
        digest.hexdigest()


def test_other_dtypes_are_read_as_float32_or_int64() -> None:
    tensors = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "byte": torch.tensor([255], dtype=torch.uint8),
    }
    read = read_safetensors(safetensors.torch.save(tensors))
    assert read["half"].tolist() == read["brain"].tolist() == [1.5, -2.0]
    assert read["double"].dtype == np.float32
    assert read["byte"].tolist() == [255]


def damaged(header: object, body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 8, "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        (damaged([]), "not a JSON object"),
        (damaged({"w": 1}), "data_offsets"),
        (damaged({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "do not fit its shape"),
        (damaged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "gap or overlap"),
        (damaged({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}), "allowed are"),
        (damaged({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}), "truncated"),
        (damaged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "4 bytes follow"),
        (damaged({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\xff" * 8), "NaN"),
        (damaged({"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}), "list of sizes"),
    ],
)
def test_a_weights_file_that_is_not_right_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidArgumentError, match=message):
        read_safetensors(data)
    with pytest.raises(InvalidArgumentError, match=r"w\.safetensors"):
        read_safetensors(path)


def test_a_missing_weights_file_and_too_many_tensors_are_told() -> None:
    with pytest.raises(InvalidArgumentError, match="there is no such file"):
        read_safetensors(Path("/nowhere/w.safetensors"))
    manifest = Manifest.of([("a", (1,), TensorKind.TRAINABLE), ("b", (1,), TensorKind.TRAINABLE)])
    data = b"".join(safetensors_parts(manifest, Arena.zeros(manifest)))
    with pytest.raises(InvalidArgumentError, match="at most 1 are allowed"):
        read_safetensors(data, FileLimits(max_tensors=1))
