"""A node's own datasets: the catalogue file and the array files it names.

The catalogue file is YAML. Paths are relative to it; `classes` may be given where a node does not hold every class::

    datasets:
      shapes:       {npz: shapes.npz}                                     # arrays `x` (N, ...) and `y` (N,)
      shapes-test:  {x: t10k-images-idx3-ubyte.gz, y: t10k-labels-idx1-ubyte.gz}   # IDX, compressed or not, or .npy
      ward-7:       {npz: ward.npz, classes: 12}

Bytes (uint8) are scaled to 0..1; other numbers are taken as they are. Labels are integers from 0.
"""

from __future__ import annotations

import functools
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cortex_common.data.catalogue import DatasetInfo, known_datasets
from cortex_common.data.idx import idx_shape, read_idx
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.yaml_text import load_yaml

Array = NDArray[Any]

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_FORMS = "{npz: FILE} with arrays x and y, or {x: FILE, y: FILE} in IDX or .npy format, optionally classes: N"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One dataset of a catalogue file.

    Attributes:
        name: Of the dataset.
        inputs: Where `x` is.
        labels: Where `y` is; the same path as `inputs` for an .npz.
        classes: As given in the catalogue, else found in the labels.
        source: Catalogue file and entry, for messages.
    """

    name: str
    inputs: Path
    labels: Path
    classes: int | None
    source: str

    def info(self) -> DatasetInfo:
        """Shape and counts; read once per state of the files.

        Raises:
            InvalidArgumentError: a file is missing, damaged, or its arrays do not fit together.
        """
        try:
            return _info(self, _version(self.inputs), _version(self.labels))
        except (NotFoundError, CorruptError) as error:
            raise InvalidArgumentError(f"{self.source}: {error}") from error

    def read(self) -> tuple[Array, NDArray[np.int64]]:
        """Inputs as stored and labels.

        Raises:
            InvalidArgumentError: a file is missing, damaged, or its arrays do not fit together.
        """
        self.info()
        try:
            return _array(self.inputs, "x"), _array(self.labels, "y").astype(np.int64)
        except (NotFoundError, CorruptError) as error:
            raise InvalidArgumentError(f"{self.source}: {error}") from error


def read_catalogue(path: Path) -> Mapping[str, FileEntry]:
    """The entries of a catalogue file, by name.

    Raises:
        InvalidArgumentError: names file, entry, what was given and what is allowed.
    """
    try:
        return _read_catalogue(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise InvalidArgumentError(f"catalogue {path}: cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=16)
def _read_catalogue(path: Path, _version: int) -> Mapping[str, FileEntry]:
    try:
        document = load_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"catalogue {path}: not YAML: {error}") from error
    if not isinstance(document, dict) or set(document) != {"datasets"} or not isinstance(document["datasets"], dict):
        raise InvalidArgumentError(f"catalogue {path}: allowed is one key, datasets, that maps names to {_FORMS}")
    return {str(name): _entry(path, str(name), value) for name, value in document["datasets"].items()}


def _entry(path: Path, name: str, value: object) -> FileEntry:
    source = f"catalogue {path}: {name}"
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(f"{source}: bad name; allowed are 1 to 63 of a-z, 0-9, '.', '_', '-'")
    if name in known_datasets():
        raise InvalidArgumentError(f"{source}: this name is built in; allowed is any other name")
    if not isinstance(value, dict) or set(value) - {"classes"} not in ({"npz"}, {"x", "y"}):
        raise InvalidArgumentError(f"{source}: {value!r} given; allowed: {_FORMS}")
    classes = value.get("classes")
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise InvalidArgumentError(f"{source}: classes: {classes!r} given; allowed: a whole number from 1")
    files = {key: value[key] for key in value if key != "classes"}
    if bad := [f"{key}: {file!r}" for key, file in files.items() if not isinstance(file, str) or not file]:
        raise InvalidArgumentError(f"{source}: {', '.join(bad)} given; allowed: a path")
    inputs, labels = (path.parent / Path(files.get("npz", files.get(key, ""))).expanduser() for key in ("x", "y"))
    return FileEntry(name, inputs, labels, classes, source)


def _version(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from error
    return state.st_mtime_ns, state.st_size


@functools.lru_cache(maxsize=256)
def _info(entry: FileEntry, _inputs_version: tuple[int, int], _labels_version: tuple[int, int]) -> DatasetInfo:
    shape = _shape(entry.inputs)
    labels = _array(entry.labels, "y")
    if len(shape) < 2 or 0 in shape:
        raise CorruptError(f"{entry.inputs}: x has shape {list(shape)}; allowed: (N, ...) with at least one example")
    if labels.ndim != 1 or len(labels) != shape[0] or labels.dtype.kind not in "iu":
        raise CorruptError(
            f"{entry.labels}: y has shape {list(labels.shape)} and type {labels.dtype}; "
            f"allowed: ({shape[0]},) whole numbers, one for each x"
        )
    classes = entry.classes or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        raise CorruptError(f"{entry.labels}: labels from {labels.min()} to {labels.max()}; allowed: 0 to {classes - 1}")
    return DatasetInfo(entry.name, shape[1:], classes, shape[0])


def _shape(path: Path) -> tuple[int, ...]:
    """Shape of the inputs without reading them."""
    if path.suffix not in {".npz", ".npy"}:
        return idx_shape(path)
    return tuple(_array(path, "x", header_only=True).shape)


def _array(path: Path, key: str, *, header_only: bool = False) -> Array:
    if path.suffix not in {".npz", ".npy"}:
        return read_idx(path)
    try:
        array = _from_npz(path, key, header_only) if path.suffix == ".npz" else np.load(path, "r", allow_pickle=False)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptError(f"{path}: cannot be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise CorruptError(f"{path}: {key} is not an array of numbers")
    return array


def _from_npz(path: Path, key: str, header_only: bool) -> Array:
    with zipfile.ZipFile(path) as archive:
        member = f"{key}.npy"
        if member not in archive.namelist():
            names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
            raise CorruptError(f"{path}: has the arrays {names or '(none)'}; needed are x and y")
        with archive.open(member) as stream:
            if not header_only:
                return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
            read = np.lib.format.read_array_header_1_0
            version = np.lib.format.read_magic(stream)
            shape, _, kind = read(stream) if version == (1, 0) else np.lib.format.read_array_header_2_0(stream)
            return np.broadcast_to(np.zeros((), kind), shape)
