"""Cortex beside other systems on the same machine: rounds without training, and training to an accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from benchmarks.contestants import Contestant, Cortex, Measured
from benchmarks.machine import describe
from benchmarks.network import running_network
from benchmarks.peers.flower import flower
from benchmarks.peers.gloo import gloo
from benchmarks.peers.nvflare import nvflare
from benchmarks.store import PartialResults
from benchmarks.training import Algorithm, Curve, TrainingTask, train_with_cortex, write_examples
from benchmarks.workloads import Kind, Workload

NULL_KEY = ("system", "parameters", "codec", "kind", "workers")
TRAINING_KEY = ("system", "algorithm", "codec", "workers")
Say = Callable[[str, Sequence[float]], None]


class Compared(Contestant, Protocol):
    """A system that is up, for both kinds of work."""

    versions: Mapping[str, str]

    def train(self, training: TrainingTask) -> Curve:
        """Train until the accuracy wanted."""


class ComparedCortex:
    """Cortex, warmed up by a small job as the others are."""

    versions: Mapping[str, str] = {}

    def __init__(self, contestant: Cortex) -> None:
        self._contestant = contestant

    def run(self, workload: Workload) -> Measured:
        """Rounds without training."""
        return self._contestant.run(workload)

    def train(self, training: TrainingTask) -> Curve:
        """Train until the accuracy wanted."""
        return train_with_cortex(self._contestant.network, training)


@contextmanager
def _cortex(workers: int) -> Iterator[Compared]:
    with running_network(workers) as network:
        contestant = Cortex(network)
        contestant.warm_up("int8", workers)
        yield ComparedCortex(contestant)


SYSTEMS: Mapping[str, Callable[[int], AbstractContextManager[Compared]]] = {
    "cortex": _cortex,
    "gloo": gloo,
    "nvflare": nvflare,
    "flower": flower,
}
"""By name: brings a system up with so many workers, everybody connected, and takes it down again."""

_CORTEX_CASES = (("none", Kind.NULL), ("int8", Kind.NULL), ("int4", Kind.NULL), ("none", Kind.EXCHANGE))
_CORTEX_CASES += (("int8", Kind.EXCHANGE),)
_ALGORITHMS = {
    "cortex": ((Algorithm.FEDAVG, "none"), (Algorithm.DILOCO, "none"), (Algorithm.DILOCO, "int8")),
    "gloo": ((Algorithm.FEDAVG, "none"), (Algorithm.DILOCO, "none"), (Algorithm.DDP, "none")),
    "nvflare": ((Algorithm.FEDAVG, "none"),),
    "flower": ((Algorithm.FEDAVG, "none"),),
}


def null_cases(system: str, parameters: int, workers: int, rounds: int) -> list[Workload]:
    """What a system is measured with at one size."""
    if system == "cortex":
        return [Workload(parameters, codec, kind, workers, rounds, warm_up=2) for codec, kind in _CORTEX_CASES]
    return [Workload(parameters, workers=workers, rounds=rounds)]


def compare_null(
    systems: Sequence[str], parameters: int, workers: int, rounds: int, store: PartialResults, say: Say
) -> None:
    """Rounds of one size with each system, one after another; each result is kept as soon as it is there."""
    for system in systems:
        machine = describe()
        with SYSTEMS[system](workers) as contestant:
            for case in null_cases(system, parameters, workers, rounds):
                measured = contestant.run(case)
                entry: dict[str, Any] = {"system": system, "versions": dict(contestant.versions), **asdict(case)}
                store.put({**entry, "runs": [asdict(measured)]}, machine)
                say(f"{system} {case.label}", measured.seconds)


def compare_training(systems: Sequence[str], workers: int, repeat: int, store: PartialResults, say: Say) -> None:
    """Training with each system and each algorithm it has; each repetition with fresh processes."""
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        data = write_examples(Path(name), workers)
        for system in systems:
            machine = describe()
            tasks = [TrainingTask(data, algorithm, workers, codec) for algorithm, codec in _ALGORITHMS[system]]
            runs: list[list[dict[str, Any]]] = [[] for _ in tasks]
            for _ in range(repeat):
                with SYSTEMS[system](workers) as contestant:
                    for task, found in zip(tasks, runs, strict=True):
                        curve = contestant.train(task)
                        found.append(asdict(curve))
                        names = {"system": system, "algorithm": task.algorithm, "codec": task.codec, "workers": workers}
                        store.put({**names, "versions": dict(contestant.versions), "runs": found}, machine)
                        say(f"{system} {task.algorithm} {task.codec}: rounds", [point.at_s for point in curve.points])
