"""What all other systems have in common: a task is submitted, its rounds are heard of, its cost is added up."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise

from benchmarks.contestants import Measured
from benchmarks.peers.nest import Nest
from benchmarks.peers.tasks import TaskFile, check_counted
from benchmarks.processes import Usage
from benchmarks.training import Curve, Point, TrainingTask
from benchmarks.workloads import Workload

_PATIENCE_S = 300.0


class Peer(ABC):
    """A system that is up. A subclass says how to submit, and which processes are its server's."""

    null_algorithm = ""

    def __init__(self, nest: Nest, task: TaskFile, versions: Mapping[str, str]) -> None:
        self._nest = nest
        self._task = task
        self.versions = versions

    @abstractmethod
    def submit(self) -> None:
        """Start the task in the file; return when the system has accepted it."""

    @abstractmethod
    def is_server(self, command_line: str) -> bool:
        """Whether a process adds updates up or keeps them."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until nothing is left of an earlier task."""

    def warm_up(self, workers: int) -> None:
        """A small task, after which everybody is connected."""
        self.run(Workload(1_000, workers=workers, rounds=1, warm_up=0))

    def run(self, workload: Workload) -> Measured:
        """Rounds without training. Bytes are those of the parameters, for nobody tells what goes over the wire."""
        self.settle()
        self._task.write_null(workload, algorithm=self.null_algorithm)
        self.submit()
        last = workload.warm_up + workload.rounds
        before = self._usage_at(workload.warm_up)
        after = self._usage_at(last)
        peak = self._nest.peak_bytes(self.is_server)
        events = self._task.events()[: last + 1]
        check_counted(events, workload.workers)
        counted = pairwise(events[workload.warm_up :])
        seconds = [later.seconds or later.at - earlier.at for earlier, later in counted]
        used = after.since(before)
        return Measured(
            parameters=workload.parameters,
            seconds=seconds,
            exchange_s=[],
            train_s=[],
            period_s=sum(seconds) / len(seconds),
            cpu_s={name: total / len(seconds) for name, total in used.groups.items()},
            bytes_up=4 * workload.parameters * workload.workers,
            bytes_down=4 * workload.parameters * workload.workers,
            others_cores=used.others,
            server_peak_bytes=peak,
        )

    def train(self, training: TrainingTask) -> Curve:
        """Train until the best accuracy wanted is reached or the rounds are over."""
        self.settle()
        self._task.write(**training.peer_fields())
        before = self._nest.usage()
        self.submit()
        accepted_s = time.monotonic()
        self._task.wait(
            lambda events: training.is_over([event.accuracy or 0.0 for event in events[1:]]),
            self._nest.check,
            _PATIENCE_S,
        )
        used = self._nest.usage().since(before)
        points = [
            Point(event.seconds or event.at - accepted_s, event.accuracy or 0.0) for event in self._task.events()[1:]
        ]
        return Curve(points, used.total_s, used.others)

    def _usage_at(self, round_number: int) -> Usage:
        self._task.wait(lambda events: bool(events) and events[-1].round >= round_number, self._nest.check, _PATIENCE_S)
        return self._nest.usage()
