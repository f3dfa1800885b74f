"""Peak memory of an aggregator against the number of workers and the size of the model."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.certificates import Certificates
from benchmarks.lone_aggregator import LoneAggregator, lone_aggregator
from benchmarks.processes import Usage, peak_bytes, usage_of
from benchmarks.uploaders import RoundCost, uploaders
from benchmarks.workloads import Workload

MEMORY_KEY = ("parameters", "codec", "workers")


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """Memory and time of one aggregator.

    Attributes:
        idle_bytes: Peak before the first update.
        peak_bytes: Peak over all rounds.
        rounds: After the warm-up.
        aggregator_cpu_s: CPU-seconds of the aggregator in a mean round.
        uploaders_cpu_s: The same of all simulated workers together.
    """

    idle_bytes: int
    peak_bytes: int
    rounds: list[RoundCost]
    aggregator_cpu_s: float
    uploaders_cpu_s: float
    others_cores: float


def allowed_bytes(parameters: int, workers: int) -> int:
    """What an aggregator may take: 13 B a parameter, 300 MB, 5 MB a concurrent worker."""
    return 13 * parameters + 300_000_000 + 5_000_000 * workers


def measure(workload: Workload) -> MemoryCost:
    """Run the rounds of a workload with simulated workers against a fresh aggregator."""
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name)
        certificates = Certificates(directory / "certificates")
        with lone_aggregator(directory, certificates) as aggregator:
            return asyncio.run(_rounds(workload, aggregator, certificates))


async def _rounds(workload: Workload, aggregator: LoneAggregator, certificates: Certificates) -> MemoryCost:
    idle_bytes = peak_bytes(aggregator.pid)
    async with uploaders(workload, aggregator.address, certificates) as cohort:
        await cohort.begin()
        for number in range(workload.warm_up):
            await cohort.round(1 + number)
        before = _usage(aggregator)
        rounds = [await cohort.round(1 + workload.warm_up + number) for number in range(workload.rounds)]
        used = _usage(aggregator).since(before)
    return MemoryCost(
        idle_bytes=idle_bytes,
        peak_bytes=peak_bytes(aggregator.pid),
        rounds=rounds,
        aggregator_cpu_s=used.groups["aggregator"] / len(rounds),
        uploaders_cpu_s=used.groups["uploaders"] / len(rounds),
        others_cores=used.others,
    )


def _usage(aggregator: LoneAggregator) -> Usage:
    return usage_of({"aggregator": frozenset({aggregator.pid}), "uploaders": frozenset({os.getpid()})})
