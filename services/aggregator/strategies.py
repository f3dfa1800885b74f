"""Outer optimisers: how the weighted mean of updates becomes the next version.

Legend: n elements of one chunk, S state vectors of a rule. An update is local - base, the negative of the outer
gradient, so a rule's direction is added. A rule works on any range of elements by itself and in float64; its state is
kept as float32, so that a run that reads it back equals one that never stopped.

Rules that need every update instead of the mean (median, Krum) belong where `batches` takes the mean; rules without a
round (buffered, delayed) would call `step` with one update's share as the mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.strategies import complete_options
from cortex_common.tensors import Float32s

Float64s = NDArray[np.float64]
_PIECE = 16 * 1024
"""Elements worked on at a time: the temporaries stay in the cache."""


class Rule(Protocol):
    """The direction of one outer step; never changes the mean."""

    slots: int
    """S."""

    def begin(self, state_Sn: Float32s) -> None:
        """Fill the state of the first step."""

    def direction(self, mean_n: Float64s, state_Sn: Float32s, work_n: Float64s) -> Float64s:
        """What is added, times the learning rate, to the parameters; the state becomes that of the next step.

        Args:
            mean_n: Weighted mean of local - base.
            state_Sn: The state, changed in place.
            work_n: Room for the result.
        """


@dataclass(frozen=True, slots=True)
class OuterStrategy:
    """A rule with its options, applied chunk by chunk; threads may share it."""

    name: str
    options: Mapping[str, float]
    """All of them."""
    learning_rate: float
    rule: Rule

    @property
    def slots(self) -> int:
        """State vectors kept beside each version, each as long as the model; 0: none."""
        return self.rule.slots

    @property
    def layout(self) -> bytes:
        """What its state is, canonical: two states of the same layout mean the same."""
        facts = {"options": self.options, "slots": self.slots, "strategy": self.name}
        return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()

    def begin(self, state_Sn: Float32s) -> None:
        """Fill the state of the first step."""
        self.rule.begin(state_Sn)

    def step(self, base_n: Float32s, mean_n: Float64s, state_Sn: Float32s, out_n: Float32s) -> None:
        """Write the next values of one chunk into `out_n`, which may be `base_n`, and the next state over the old one.

        Sums in float64, rounded once to float32; an overflow becomes infinite and is refused by whoever encodes it.
        """
        work_n = np.empty(min(_PIECE, base_n.size), np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, base_n.size, _PIECE):
                piece = slice(start, start + _PIECE)
                work = work_n[: mean_n[piece].size]
                direction = self.rule.direction(mean_n[piece], state_Sn[:, piece], work)
                if self.learning_rate != 1:
                    direction = np.multiply(direction, self.learning_rate, out=work)
                np.add(base_n[piece], direction, out=out_n[piece], dtype=np.float64, casting="same_kind")


class Mean:
    """The mean itself. Source: FedAvg, McMahan et al., arXiv 1602.05629, Algorithm 1."""

    slots = 0

    def begin(self, state_Sn: Float32s) -> None:
        """There is no state."""

    def direction(self, mean_n: Float64s, state_Sn: Float32s, work_n: Float64s) -> Float64s:
        """The mean."""
        return mean_n


@dataclass(frozen=True, slots=True)
class Momentum:
    """b <- momentum b + mean; the direction is b, or with Nesterov mean + momentum b. The first b is the mean.

    Sources: FedAvgM, Hsu et al., arXiv 1909.06335; with Nesterov DiLoCo, arXiv 2311.08105, Algorithm 1.
    """

    momentum: float
    nesterov: bool
    slots = 1

    def begin(self, state_Sn: Float32s) -> None:
        """Zero."""
        state_Sn.fill(0)

    def direction(self, mean_n: Float64s, state_Sn: Float32s, work_n: Float64s) -> Float64s:
        """As torch.optim.SGD computes it from the negative mean."""
        np.multiply(state_Sn[0], self.momentum, out=work_n, dtype=np.float64)
        work_n += mean_n
        state_Sn[0] = work_n
        if self.nesterov:
            work_n *= self.momentum
            work_n += mean_n
        return work_n


Second = Callable[[Float64s, Float64s], None]
"""Changes second moments v_n in place, given the squares of the mean."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """m <- beta1 m + (1 - beta1) mean; v by `second`, from tau^2 on; the direction is m / (sqrt(v) + tau).

    No correction of bias. Source: Reddi et al., arXiv 2003.00295, Algorithm 2.
    """

    beta1: float
    tau: float
    second: Second
    slots = 2

    def begin(self, state_Sn: Float32s) -> None:
        """Zero, and tau^2."""
        state_Sn[0] = 0
        state_Sn[1] = self.tau**2

    def direction(self, mean_n: Float64s, state_Sn: Float32s, work_n: Float64s) -> Float64s:
        """The first moment over the root of the second."""
        v_n = state_Sn[1].astype(np.float64)
        np.multiply(mean_n, mean_n, out=work_n)
        self.second(v_n, work_n)
        state_Sn[1] = v_n
        np.sqrt(v_n, out=v_n)
        v_n += self.tau
        np.multiply(mean_n, 1 - self.beta1, out=work_n)
        work_n += np.multiply(state_Sn[0], self.beta1, dtype=np.float64)
        state_Sn[0] = work_n
        work_n /= v_n
        return work_n


def _adam(beta2: float) -> Second:
    def second(v_n: Float64s, square_n: Float64s) -> None:
        v_n *= beta2
        v_n += (1 - beta2) * square_n

    return second


def _yogi(beta2: float) -> Second:
    def second(v_n: Float64s, square_n: Float64s) -> None:
        v_n -= (1 - beta2) * square_n * np.sign(v_n - square_n)

    return second


def _adagrad(v_n: Float64s, square_n: Float64s) -> None:
    v_n += square_n


_RULES: dict[str, Callable[[Mapping[str, float]], Rule]] = {
    "fedavg": lambda _: Mean(),
    "fedavgm": lambda options: Momentum(options["momentum"], nesterov=False),
    "diloco": lambda options: Momentum(options["momentum"], nesterov=True),
    "fedadam": lambda options: Adaptive(options["beta1"], options["tau"], _adam(options["beta2"])),
    "fedyogi": lambda options: Adaptive(options["beta1"], options["tau"], _yogi(options["beta2"])),
    "fedadagrad": lambda options: Adaptive(options["beta1"], options["tau"], _adagrad),
}


def create_strategy(name: str, options_json: str) -> OuterStrategy:
    """Build a strategy by name; options left out take their defaults.

    Raises:
        InvalidArgumentError: unknown name; or lists every mistake in the options.
    """
    try:
        given = json.loads(options_json or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"strategy {name[:80]}: options are not JSON") from error
    if not isinstance(given, dict):
        raise InvalidArgumentError(f"strategy {name[:80]}: options are not a JSON object")
    options = complete_options(name, given)
    return OuterStrategy(name, options, options["server_learning_rate"], _RULES[name](options))
