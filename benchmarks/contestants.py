"""Systems that can be given a workload. A further one is a class with `run`, and a line in CONTESTANTS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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

    def _follow(self, workload: Workload) -> tuple[JobStatus, list[tuple[int, Usage]]]:
        """The job's last status, and how many rounds were over and what had been used when counting began and ended."""
        marks: list[tuple[int, Usage]] = []
        with Client(directory=self.network.directory) as client:
            job_id = client.submit(job_of(workload))
            last: JobStatus | None = None
            for last in client.watch(job_id):
                wanted = workload.warm_up if not marks else workload.warm_up + workload.rounds
                if len(last.history) >= wanted and len(marks) < 2:
                    marks.append((len(last.history), self.network.usage()))
            if last is None or last.status is not JobPhase.COMPLETED:
                raise BenchmarkError(f"{workload.label}: {last.error if last else 'no status'}")
        return last, marks

    def _measured(self, workload: Workload, status: JobStatus, marks: list[tuple[int, Usage]]) -> Measured:
        counted = status.history[workload.warm_up : workload.warm_up + workload.rounds]
        for report in counted:
            if report.accepted != workload.workers or report.bytes_up < report.accepted * workload.parameters // 2:
                raise BenchmarkError(f"{workload.label}: round {report.round} did not count every update")
        (first, before), (end, after) = marks
        used, rounds = after.since(before), end - first
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
