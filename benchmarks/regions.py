"""What crosses between regions, and what a round takes, with one aggregator for all and with one in each region."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.network import BenchmarkError, running_network
from benchmarks.summary import Summary
from benchmarks.workloads import Kind, Workload, job_of, size_label
from cortex.client import Client

REGIONS_KEY = ("parameters", "codec", "workers", "regions", "topology")
TOPOLOGIES = ("flat", "regional")


def measure(
    sizes: Sequence[int], codecs: Sequence[str], workers: int, regions: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Jobs that differ in nothing but their topology, on the same network; one entry a job.

    Raises:
        BenchmarkError: a job failed, or a round did not count everybody.
    """
    names = ",".join(f"region-{number}" for number in range(1, regions + 1))
    with running_network(workers, regions=names) as network, Client(directory=network.directory) as client:
        for size in sizes:
            for codec in codecs:
                for topology in TOPOLOGIES:
                    case = Workload(size, codec, Kind.EXCHANGE, workers, rounds)
                    _run(client, replace(case, parameters=100_000, rounds=2), topology)
                    network.settle()
                    counted = _run(client, case, topology)
                    yield {**asdict(case), "regions": regions, "topology": topology, **counted}


def _run(client: Client, case: Workload, topology: str) -> dict[str, list[float]]:
    job = {**job_of(case), "aggregation": {"topology": topology}}
    status = client.wait(client.submit(job))
    counted = status.history[case.warm_up : case.warm_up + case.rounds]
    if len(counted) < case.rounds or any(report.accepted != case.workers for report in counted):
        raise BenchmarkError(f"{case.label}, {topology}: {status.error or 'a round did not count every update'}")
    return {
        "seconds": [report.seconds for report in counted],
        "bytes_up": [report.bytes_up for report in counted],
        "bytes_down": [report.bytes_down for report in counted],
        "bytes_between_regions": [report.bytes_between_regions for report in counted],
    }


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row a job."""
    lines = [
        "### Bytes between regions, a round",
        "",
        "| parameters | codec | workers in regions | topology | seconds: median (range) | MB of all workers "
        "| MB between regions | flat's are times this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    flat = {_case(entry): _crossed(entry) for entry in entries if entry["topology"] == "flat"}
    return "\n".join(lines + [_row(entry, flat.get(_case(entry))) for entry in entries])


def _case(entry: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(entry[name] for name in REGIONS_KEY if name != "topology")


def _crossed(entry: Mapping[str, Any]) -> float:
    return Summary.of(entry["bytes_between_regions"]).median


def _row(entry: Mapping[str, Any], flat: float | None) -> str:
    moved = Summary.of([up + down for up, down in zip(entry["bytes_up"], entry["bytes_down"], strict=True)]).median
    cells = (
        size_label(entry["parameters"]),
        entry["codec"],
        f"{entry['workers']} in {entry['regions']}",
        entry["topology"],
        Summary.of(entry["seconds"]).text(),
        f"{moved / 1e6:.1f}",
        f"{_crossed(entry) / 1e6:.1f}",
        "" if flat is None else f"{flat / _crossed(entry):.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"
