"""Results as JSON files, one a measurement, and as tables in the README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    channel,
    channel_return,
    channel_silence,
    codecs,
    comparison_tables,
    regions,
    targets,
    worker_memory,
)
from benchmarks.machine import load_average, speed_note
from benchmarks.memory import allowed_bytes
from benchmarks.summary import Summary
from benchmarks.workloads import size_label

HOME = Path(__file__).resolve().parent
RESULTS = HOME / "results"
README, FRONT = HOME / "README.md", HOME.parent / "README.md"
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"
_START_TARGET_S = 20.0

Entry = Mapping[str, Any]


def save(kind: str, machine: Entry, entries: Sequence[Entry], out: Path = RESULTS) -> Path:
    """Write one measurement, replacing the last one of its kind."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{kind}.json"
    document = {"kind": kind, "machine": machine, "load_average_after": load_average(), "results": entries}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def write_tables(results: Path = RESULTS, readme: Path = README, front: Path = FRONT) -> str:
    """Put the tables of all results into the README, and what was to be reached into the project's: between markers.

    Returns:
        The tables of the former.
    """
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    found = {kind: document["results"] for kind, document in documents.items() if "results" in document}
    parts = [targets.table(found)]
    parts += [_drawn(documents[kind], draw) for kind, draw in _TABLES.items() if kind in documents]
    parts += [
        f"{draw(found[kind])}\n\n{comparison_tables.machine_line(found[kind])}"
        for kind, draw in _PARTIAL.items()
        if found.get(kind)
    ]
    if speeds := documents.get("codecs"):
        head = "### Codecs\n\n" + codecs.table(speeds)
        parts.append(f"{head}\n\n{_machine_line(speeds)}")
    tables = "\n\n".join(part for part in parts if part)
    _replace(readme, tables)
    if parts[0] and found.get("peers"):
        lines = [*parts[0].splitlines()[2:], "", comparison_tables.machine_line(found["peers"])]
        _replace(front, "\n".join(lines))
    return tables


def _replace(page: Path, text: str) -> None:
    """Put a text between the markers of a page."""
    before, _, rest = page.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}")


def _drawn(document: Entry, draw: Any) -> str:
    return f"{draw(document['results'])}\n\n{_machine_line(document)}"


def _machine_line(document: Entry) -> str:
    facts = document["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    loads = str(facts["load_average"][0])
    if "load_average_after" in document:
        loads += f" before, {document['load_average_after'][0]} after"
    return (
        f"*{facts['measured_at']}: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"{facts['system']}, Python {facts['python']}, {packages}; load average {loads}{speed_note(facts)}.*"
    )


def _rounds(entries: Sequence[Entry]) -> str:
    lines = [
        "### Rounds, real processes",
        "",
        "| system | parameters | codec | round | workers | seconds: median (range) | period s "
        "| exchange s | CPU-s | of it server / workers | MB up | MB down | server peak MB | others' cores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_round_row(entry) for entry in entries])


def _round_row(entry: Entry) -> str:
    runs = entry["runs"]
    seconds = Summary.of([value for run in runs for value in run["seconds"]])
    cpu = [run["cpu_s"] for run in runs]
    server = _median([each.get("aggregators", 0.0) for each in cpu])
    workers = _median([each.get("workers", 0.0) for each in cpu])
    cells = (
        entry["system"],
        size_label(entry["parameters"]),
        entry["codec"],
        entry["kind"],
        entry["workers"],
        seconds.text(3 if seconds.median < 0.5 else 2),
        f"{_median([run['period_s'] for run in runs]):.2f}",
        f"{_median([value for run in runs for value in run['exchange_s']]):.2f}",
        f"{_median([sum(each.values()) for each in cpu]):.2f}",
        f"{server:.2f} / {workers:.2f}",
        f"{runs[-1]['bytes_up'] / 1e6:.1f}",
        f"{runs[-1]['bytes_down'] / 1e6:.1f}",
        f"{max(run['server_peak_bytes'] for run in runs) / 1e6:.0f}",
        f"{_median([run['others_cores'] for run in runs]):.2f}",
    )
    return _row(cells)


def _memory(entries: Sequence[Entry]) -> str:
    lines = [
        "### Peak memory of the aggregator",
        "",
        "| parameters | codec | workers | uploaders | peak MB | allowed MB | seconds: median (range) "
        "| aggregator CPU-s | others' cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_memory_row(entry) for entry in entries])


def _memory_row(entry: Entry) -> str:
    runs = entry["runs"]
    peak = max(run["peak_bytes"] for run in runs)
    allowed = allowed_bytes(entry["parameters"], entry["workers"])
    seconds = Summary.of([each["seconds"] for run in runs for each in run["rounds"]])
    cells = (
        size_label(entry["parameters"]),
        entry["codec"],
        entry["workers"],
        entry["uploaders"],
        f"{peak / 1e6:.0f}",
        _verdict(peak / 1e6, allowed / 1e6, ""),
        seconds.text(),
        f"{_median([run['aggregator_cpu_s'] for run in runs]):.2f}",
        f"{_median([run['others_cores'] for run in runs]):.2f}",
    )
    return _row(cells)


def _start(entries: Sequence[Entry]) -> str:
    total = Summary.of([entry["total_s"] for entry in entries])
    rows = (
        ("`cortex up` to the end of round 1", total.text(1), _verdict(total.median, _START_TARGET_S, " s")),
        ("of it `cortex up --detach`, certificates included", _spread(entries, "up_s", 1), ""),
        ("of it submission to the end of round 1", _spread(entries, "first_round_s", 1), ""),
        ("round 1 as told", _spread(entries, "first_seconds", 2), ""),
        ("later rounds as told (medians)", _text([entry["later_seconds"]["median"] for entry in entries], 2), ""),
        ("CPU-s of all workers, submission to the end of round 1", _spread(entries, "first_cpu_s", 2), ""),
        ("CPU-s of all workers, a later round", _spread(entries, "later_cpu_s", 2), ""),
        ("trainer processes kept from round to round", str(all(entry["trainers_kept"] for entry in entries)), ""),
        ("others' cores", _spread(entries, "others_cores", 2), ""),
    )
    head = [f"### Start, {len(entries)} times in an empty directory", "", "| what | seconds: median (range) | target |"]
    return "\n".join([*head, "|---|---|---|", *(_row(cells) for cells in rows)])


_TABLES = {"rounds": _rounds, "start": _start}
_PARTIAL = {
    "memory": _memory,
    "worker_memory": worker_memory.table,
    "peers": comparison_tables.peers,
    "training": comparison_tables.training,
    "links": comparison_tables.links,
    "sealing": comparison_tables.sealing,
    "regions": regions.table,
    "channel": channel.table,
    "channel_return": channel_return.table,
    "channel_silence": channel_silence.table,
}


def _verdict(value: float, target: float | None, unit: str) -> str:
    if target is None:
        return ""
    return f"{target:g}{unit} {'met' if value <= target else '**missed**'}"


def _median(values: Sequence[float]) -> float:
    return Summary.of(values).median


def _text(values: Sequence[float], digits: int) -> str:
    return Summary.of(values).text(digits)


def _spread(entries: Sequence[Entry], key: str, digits: int) -> str:
    return _text([entry[key] for entry in entries], digits)


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
