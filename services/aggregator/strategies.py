"""How the weighted mean of updates becomes the next version. Legend: n elements of one chunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import InvalidArgumentError
from cortex_common.tensors import Float32s


class OuterStrategy(Protocol):
    """One rule, applied chunk by chunk. Rules with state of their own keep it beside the version (none yet)."""

    name: str

    def step(self, base_n: Float32s, mean_delta_n: NDArray[np.float64], out_n: Float32s) -> None:
        """Write the next values of one chunk into `out_n`."""


class FedAvg:
    """theta <- theta + sum(w * delta) / sum(w). Source: McMahan et al., arXiv 1602.05629, Algorithm 1."""

    name = "fedavg"

    def step(self, base_n: Float32s, mean_delta_n: NDArray[np.float64], out_n: Float32s) -> None:
        """Add in float64, round once to float32; an overflow becomes infinite and is refused by whoever encodes it."""
        with np.errstate(over="ignore"):
            np.add(base_n, mean_delta_n, out=out_n, dtype=np.float64, casting="same_kind")


def create_strategy(name: str, options_json: str) -> OuterStrategy:
    """Build a strategy by name.

    Raises:
        InvalidArgumentError: unknown name or option.
    """
    if name not in _STRATEGIES:
        raise InvalidArgumentError(f"strategy {name!r}; allowed are {', '.join(_STRATEGIES)}")
    try:
        options = json.loads(options_json or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"strategy {name}: options are not JSON") from error
    if not isinstance(options, dict):
        raise InvalidArgumentError(f"strategy {name}: options are not a JSON object")
    return _STRATEGIES[name](options)


def _fedavg(options: Mapping[str, Any]) -> OuterStrategy:
    if options:
        raise InvalidArgumentError(f"strategy fedavg: unknown option {', '.join(sorted(options))}; it has none")
    return FedAvg()


_STRATEGIES: dict[str, Callable[[Mapping[str, Any]], OuterStrategy]] = {"fedavg": _fedavg}
