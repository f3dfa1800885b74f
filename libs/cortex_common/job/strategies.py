"""Outer optimisers by name: their options, defaults and ranges. Submission and aggregators check against this table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cortex_common.errors import InvalidArgumentError, Violation

StrategyName = Literal["fedavg", "fedavgm", "diloco", "fedadam", "fedyogi", "fedadagrad"]


@dataclass(frozen=True, slots=True)
class Option:
    """A number above 0, or from 0 up to but not including 1 when it is a decay."""

    default: float
    is_decay: bool = False

    @property
    def allowed(self) -> str:
        """The range in words."""
        return "allowed: a number from 0 to below 1" if self.is_decay else "allowed: a number above 0"

    def admits(self, value: object) -> bool:
        """Whether a value lies in the range."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.is_decay:
            return 0 <= value < 1
        return value > 0 and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


_ADAPTIVE = {"server_learning_rate": Option(0.1), "beta1": Option(0.9, is_decay=True), "tau": Option(1e-3)}
_SECOND = {"beta2": Option(0.99, is_decay=True)}
STRATEGY_OPTIONS: Mapping[StrategyName, Mapping[str, Option]] = {
    "fedavg": {"server_learning_rate": Option(1.0)},
    "fedavgm": {"server_learning_rate": Option(1.0), "momentum": Option(0.9, is_decay=True)},
    "diloco": {"server_learning_rate": Option(0.7), "momentum": Option(0.9, is_decay=True)},
    "fedadam": _ADAPTIVE | _SECOND,
    "fedyogi": _ADAPTIVE | _SECOND,
    "fedadagrad": _ADAPTIVE,
}


def option_violations(strategy: StrategyName, options: Mapping[str, object]) -> list[Violation]:
    """Everything wrong with a strategy's options; each path is the option's name."""
    known = STRATEGY_OPTIONS[strategy]
    violations = []
    for name, value in options.items():
        option = known.get(name)
        if option is None:
            violations.append(Violation(name, f"unknown option of {strategy}; allowed: {', '.join(sorted(known))}"))
        elif not option.admits(value):
            violations.append(Violation(name, f"{repr(value)[:80]} given; {option.allowed}"))
    return violations


def complete_options(strategy: str, options: Mapping[str, object]) -> dict[str, float]:
    """All options of a strategy as numbers, defaults filled in.

    Raises:
        InvalidArgumentError: unknown strategy; or lists every mistake in its options.
    """
    known = next((each for each in STRATEGY_OPTIONS if each == strategy), None)
    if known is None:
        raise InvalidArgumentError(f"strategy {strategy[:80]!r}; allowed are {', '.join(STRATEGY_OPTIONS)}")
    if violations := option_violations(known, options):
        raise InvalidArgumentError.of(f"options of strategy {strategy}", violations)
    defaults = {name: option.default for name, option in STRATEGY_OPTIONS[known].items()}
    return defaults | {name: float(value) for name, value in options.items() if isinstance(value, int | float)}
