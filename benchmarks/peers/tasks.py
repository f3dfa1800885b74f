"""The benchmark's side of `apps/peer_task.py`: hands out a task and hears how far it is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.network import BenchmarkError
from benchmarks.workloads import INPUT_DIM, OUTPUT_DIM, Workload, hidden_width
from cortex_common.clock import SystemClock

APPS = Path(__file__).resolve().parent / "apps"
STEP = 2.0**-10
_POLL_S = 0.02


def perceptron_shapes(widths: Sequence[int]) -> list[list[int]]:
    """Weights and biases of an MLP with these layers."""
    return [shape for width_in, width_out in pairwise(widths) for shape in ([width_out, width_in], [width_out])]


def null_shapes(parameters: int) -> list[list[int]]:
    """Those of the model that Cortex is given for a workload."""
    width = hidden_width(parameters)
    return perceptron_shapes([INPUT_DIM, width, width, OUTPUT_DIM])


@dataclass(frozen=True, slots=True)
class Event:
    """One round's end.

    Attributes:
        at: Seconds on the machine's monotonic clock.
        value: The model's last.
        accuracy: If measured.
        seconds: The contestant's own count, where it does more than what counts.
    """

    round: int
    at: float
    value: float
    accuracy: float | None
    seconds: float | None


class TaskFile:
    """What the contestant's processes read, and the file they write to."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "task.json"
        self._events = directory / "events.jsonl"

    def write(self, **fields: Any) -> None:
        """A new task; its events begin anew."""
        self._events.write_text("")
        self.path.write_text(json.dumps({"events": str(self._events), **fields}))

    def write_null(self, workload: Workload, **fields: Any) -> None:
        """Rounds without training."""
        rounds = workload.warm_up + workload.rounds
        self.write(shapes=null_shapes(workload.parameters), rounds=rounds, workers=workload.workers, **fields)

    def events(self) -> list[Event]:
        """All so far."""
        return [Event(**json.loads(line)) for line in self._events.read_text().splitlines()]

    def wait(self, is_enough: Callable[[list[Event]], bool], check: Callable[[], None], patience_s: float) -> None:
        """Until the events are enough.

        Args:
            is_enough: Asked again and again.
            check: Raises if it is no use to go on.
            patience_s: How long it may take from one event to the next.

        Raises:
            BenchmarkError: nothing happens.
        """
        clock = SystemClock()
        seen, since_s = -1, clock.monotonic_s()
        while not is_enough(events := self.events()):
            check()
            if len(events) != seen:
                seen, since_s = len(events), clock.monotonic_s()
            if clock.monotonic_s() - since_s > patience_s:
                raise BenchmarkError(f"no round ended for {patience_s:.0f} s; so far: {events}")
            time.sleep(_POLL_S)


def check_counted(events: Sequence[Event], workers: int) -> None:
    """Every client's change must be in every round's model, or the round was none.

    Raises:
        BenchmarkError: a round did something else.
    """
    expected = STEP * (workers + 1) / 2
    for before, after in pairwise(events):
        if not math.isclose(after.value - before.value, expected, rel_tol=1e-3):
            raise BenchmarkError(
                f"round {after.round} moved the model by {after.value - before.value:g}, not by {expected:g}: "
                "not every update counted"
            )
