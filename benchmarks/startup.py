"""From `cortex up` in an empty directory to the end of the first round; and what a warm worker no longer pays for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.network import BenchmarkError, RunningNetwork, running_network
from benchmarks.processes import Usage
from benchmarks.summary import Summary
from cortex.client import Client
from cortex_common.job.status import JobPhase, JobStatus

_ROUNDS = 8
_JOB: Mapping[str, object] = {
    "name": "bench-start",
    "model": {"kind": "mlp", "input_dim": 64, "hidden_dims": [64, 32], "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test"},
    "training": {"optimizer": "adam", "learning_rate": 0.005, "batch_size": 32, "local_epochs": 1, "rounds": _ROUNDS},
    "placement": {"workers": 4, "min_workers": 4},
}


@dataclass(frozen=True, slots=True)
class StartCost:
    """One start.

    Attributes:
        up_s: `cortex up --detach`: directory, certificates, nine processes, all of them healthy.
        first_round_s: From the submission to the end of round 1, evaluation included.
        total_s: Both.
        first_seconds: Of round 1 alone, as the status tells.
        later_seconds: Of the later rounds, as the status tells.
        first_cpu_s: CPU-seconds of workers and trainers from the submission to the end of round 1.
        later_cpu_s: The same in a mean later round.
        trainers_kept: Whether every later round was trained by the processes of the first.
    """

    up_s: float
    first_round_s: float
    total_s: float
    first_seconds: float
    later_seconds: Summary
    first_cpu_s: float
    later_cpu_s: float
    trainers_kept: bool
    others_cores: float


@dataclass(frozen=True, slots=True)
class _Mark:
    rounds: int
    usage: Usage
    trainers: frozenset[int]

    @property
    def worker_cpu_s(self) -> float:
        return self.usage.groups["workers"]


def measure() -> StartCost:
    """Start a network of 4 workers, train a small job on real images, stop everything."""
    with running_network(4) as network, Client(directory=network.directory) as client:
        submitted = _mark(network, 0)
        job_id = client.submit(_JOB)
        marks, last = _followed(network, client, job_id)
    first, end = marks
    later = [report.seconds for report in last.history[1:]]
    wall_s = first.usage.at_s - submitted.usage.at_s
    return StartCost(
        up_s=network.up_s,
        first_round_s=wall_s,
        total_s=network.up_s + wall_s,
        first_seconds=last.history[0].seconds,
        later_seconds=Summary.of(later),
        first_cpu_s=first.worker_cpu_s - submitted.worker_cpu_s,
        later_cpu_s=(end.worker_cpu_s - first.worker_cpu_s) / (end.rounds - first.rounds),
        trainers_kept=submitted.trainers == first.trainers == end.trainers,
        others_cores=end.usage.since(submitted.usage).others,
    )


def _followed(network: RunningNetwork, client: Client, job_id: str) -> tuple[tuple[_Mark, _Mark], JobStatus]:
    """A mark after the first round and one before the last: the trainers are replaced when a job ends."""
    marks: list[_Mark] = []
    last: JobStatus | None = None
    for last in client.watch(job_id):
        done = len(last.history)
        if _is_due(marks, done):
            marks.append(_mark(network, done))
    if last is None or last.status is not JobPhase.COMPLETED or len(marks) < 2:
        raise BenchmarkError(f"the job of the start measurement did not complete: {last.error if last else ''}")
    return (marks[0], marks[-1]), last


def _is_due(marks: list[_Mark], done: int) -> bool:
    return done > (marks[-1].rounds if marks else 0) and done < _ROUNDS


def _mark(network: RunningNetwork, rounds: int) -> _Mark:
    return _Mark(rounds, network.usage(), network.trainers())


def repeated(times: int) -> Iterator[StartCost]:
    """Several starts, each in an empty directory."""
    for _ in range(times):
        yield measure()
