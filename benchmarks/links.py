"""Seconds of a round against the rate and the round trip of each worker's line."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.certificates import Certificates
from benchmarks.lone_aggregator import lone_aggregator
from benchmarks.shaping import shaped
from benchmarks.uploaders import RoundCost, uploaders
from benchmarks.workloads import Workload

LINK_KEY = ("parameters", "codec", "workers", "mbit_per_s", "round_trip_s")


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Rounds over one kind of line."""

    mbit_per_s: float
    round_trip_s: float
    rounds: list[RoundCost]

    @property
    def least_s(self) -> float:
        """What the line alone takes for a worker's bytes, up and down, with one round trip for each transfer."""
        cost = self.rounds[-1]
        bits = 8 * (cost.bytes_up + cost.bytes_down) / cost.workers
        return bits / (1e6 * self.mbit_per_s) + 2 * self.round_trip_s


def measure(workload: Workload, mbit_per_s: float, round_trip_s: float) -> LinkCost:
    """Simulated workers, each behind a line of its own, against a real aggregator."""
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name)
        certificates = Certificates(directory / "certificates")
        with (
            lone_aggregator(directory, certificates) as aggregator,
            shaped(aggregator.address, workload.workers, mbit_per_s, round_trip_s) as addresses,
        ):
            rounds = asyncio.run(_rounds(workload, aggregator.address, addresses, certificates))
    return LinkCost(mbit_per_s, round_trip_s, rounds)


async def _rounds(
    workload: Workload, control: str, addresses: list[str], certificates: Certificates
) -> list[RoundCost]:
    async with uploaders(workload, control, certificates, addresses) as cohort:
        await cohort.begin()
        for number in range(workload.warm_up):
            await cohort.round(1 + number)
        return [await cohort.round(1 + workload.warm_up + number) for number in range(workload.rounds)]
