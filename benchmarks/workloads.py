"""The work that is measured, in terms that other systems can be given too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

INPUT_DIM = 64
OUTPUT_DIM = 10
_SUFFIXES = {"k": 1_000, "M": 1_000_000}


class Kind(StrEnum):
    """What happens between two exchanges."""

    NULL = "null"
    """Nothing: the model stays as it is, so updates travel up but the same version need not travel down again."""
    EXCHANGE = "exchange"
    """One SGD step on one example: every round has a new version, so weights travel both ways."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Rounds of one kind and size.

    Attributes:
        parameters: Asked for; the model has within 5 % of it.
        rounds: That count.
        warm_up: Rounds before them.
        cool_down: Rounds after them, so that nothing is taken down while it is still measured.
    """

    parameters: int
    codec: str = "none"
    kind: Kind = Kind.NULL
    workers: int = 4
    rounds: int = 6
    warm_up: int = 1
    cool_down: int = 1

    @property
    def label(self) -> str:
        """Short name for progress lines."""
        return f"{size_label(self.parameters)} {self.codec} {self.kind}, {self.workers} workers"


def size_label(parameters: int) -> str:
    """`10M` for 10,000,000."""
    for suffix, unit in reversed(_SUFFIXES.items()):
        if parameters >= unit and parameters % unit == 0:
            return f"{parameters // unit}{suffix}"
    return str(parameters)


def parse_size(text: str) -> int:
    """10,000,000 for `10M`.

    Raises:
        ValueError: not a positive whole number, with k or M after it if you like.
    """
    unit = _SUFFIXES.get(text[-1:], 1)
    number = int(text if unit == 1 else text[:-1]) * unit
    if number < 1:
        raise ValueError(f"{text}: a positive number is needed")
    return number


def hidden_width(parameters: int) -> int:
    """Width h of two hidden layers such that the MLP 64-h-h-10 has about so many parameters: h^2 + 76 h + 10."""
    linear = INPUT_DIM + OUTPUT_DIM + 2
    return max(1, round((math.sqrt(linear**2 + 4 * (parameters - OUTPUT_DIM)) - linear) / 2))


def job_of(workload: Workload) -> Mapping[str, object]:
    """The workload as a Cortex job file says it."""
    width = hidden_width(workload.parameters)
    steps = 0 if workload.kind is Kind.NULL else 1
    return {
        "name": f"bench-{size_label(workload.parameters)}-{workload.codec}-{workload.kind}",
        "model": {"kind": "mlp", "input_dim": INPUT_DIM, "hidden_dims": [width, width], "output_dim": OUTPUT_DIM},
        "data": {"train": "digits"},
        "training": {
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "batch_size": 1,
            "local_steps": steps,
            "rounds": workload.warm_up + workload.rounds + workload.cool_down,
        },
        # Deltas of zeros would shrink to nothing, and the test with them.
        "compression": {"codec": workload.codec, "error_feedback": False, "lz4": "off"},
        "placement": {"workers": workload.workers, "min_workers": workload.workers},
    }
