"""Systems that can be given a workload. A further one is a class with `run`, and a line in CONTESTANTS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.network import BenchmarkError, RunningNetwork, running_network
from benchmarks.processes import Usage
from benchmarks.workloads import Kind, Workload, job_of
from cortex.client import Client
from cortex_common.job.status import JobPhase, JobStatus


@dataclass(slots=True)
class Measured:
    """What a workload cost, round by round after the warm-up.

    Attributes:
        seconds: Of each round, as the system tells it.
        period_s: Mean time from one round's end to the next one's, as seen from outside.
        cpu_s: CPU-seconds of all processes in a mean period, by kind of process.
        others_cores: Cores that processes which have nothing to do with this kept busy meanwhile.
        server_peak_bytes: Peak memory of the process that adds updates up.
    """

    parameters: int
    seconds: list[float]
    exchange_s: list[float]
    train_s: list[float]
    period_s: float
    cpu_s: dict[str, float]
    bytes_up: int
    bytes_down: int
    others_cores: float
    server_peak_bytes: int


@dataclass(slots=True)
class Counting:
    """What had been used when counting began and when it ended.

    Short rounds may end several at a time, as far as a status tells: it ends a round after it began at the earliest.

    Attributes:
        begins: Rounds that are over then, at least; `ends` likewise.
    """

    begins: int
    ends: int
    marks: list[tuple[int, Usage]] = field(default_factory=list)

    def see(self, done: int, usage: Callable[[], Usage]) -> None:
        """So many rounds are over."""
        wanted = max(self.ends, self.marks[0][0] + 1) if self.marks else self.begins
        if done >= wanted and len(self.marks) < 2:
            self.marks.append((done, usage()))

    def between(self, label: str) -> tuple[Usage, int]:
        """What was used in how many rounds, one at least.

        Raises:
            BenchmarkError: all were over when the first status told of any.
        """
        if len(self.marks) < 2:
            raise BenchmarkError(f"{label}: its rounds ended before a status told of them: measure more of them")
        (first, before), (end, after) = self.marks
        return after.since(before), end - first


class Contestant(Protocol):
    """A system that is up and waits for work."""

    def run(self, workload: Workload) -> Measured:
        """Do all rounds.

        Raises:
            BenchmarkError: it failed.
        """


class Cortex:
    """A local network of Cortex: every service and worker a process, mTLS everywhere, weights sealed."""

    def __init__(self, network: RunningNetwork) -> None:
        self.network = network
        self._warm: set[str] = set()

    def warm_up(self, codec: str, workers: int) -> None:
        """A small job, as other systems get one: everybody is connected afterwards, the codec's loops loaded."""
        self.network.settle()
        self._follow(Workload(100_000, codec, Kind.EXCHANGE, workers, rounds=2))
        self._warm.add(codec)

    def run(self, workload: Workload) -> Measured:
        """Submit it as a job and follow its status."""
        if workload.codec not in self._warm:
            self.warm_up(workload.codec, workload.workers)
        self.network.settle()
        return self._measured(workload, *self._follow(workload))

    def _follow(self, workload: Workload) -> tuple[JobStatus, Counting]:
        """The job's last status, and what had been used when counting began and ended."""
        counting = Counting(workload.warm_up, workload.warm_up + workload.rounds)
        with Client(directory=self.network.directory) as client:
            job_id = client.submit(job_of(workload))
            last: JobStatus | None = None
            for last in client.watch(job_id):
                counting.see(len(last.history), self.network.usage)
            if last is None or last.status is not JobPhase.COMPLETED:
                raise BenchmarkError(f"{workload.label}: {last.error if last else 'no status'}")
        return last, counting

    def _measured(self, workload: Workload, status: JobStatus, counting: Counting) -> Measured:
        counted = status.history[workload.warm_up : workload.warm_up + workload.rounds]
        for report in counted:
            if report.accepted != workload.workers or report.bytes_up < report.accepted * workload.parameters // 2:
                raise BenchmarkError(f"{workload.label}: round {report.round} did not count every update")
        used, rounds = counting.between(workload.label)
        return Measured(
            parameters=status.model.parameters if status.model else 0,
            seconds=[report.seconds for report in counted],
            exchange_s=[report.exchange_seconds for report in counted],
            train_s=[report.train_seconds for report in counted],
            period_s=used.at_s / rounds,
            cpu_s={name: seconds / rounds for name, seconds in used.groups.items()},
            bytes_up=counted[-1].bytes_up,
            bytes_down=counted[-1].bytes_down,
            others_cores=used.others,
            server_peak_bytes=self.network.aggregator_peak_bytes(),
        )


@contextmanager
def _cortex(workers: int) -> Iterator[Contestant]:
    with running_network(workers) as network:
        yield Cortex(network)


CONTESTANTS: Mapping[str, Callable[[int], AbstractContextManager[Contestant]]] = {"cortex": _cortex}
"""By name: brings up the system with so many workers, and takes it down at the end of the block."""
