"""Tables of what was measured part by part: other systems, training, shaped links, sealing, codecs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.machine import speed_note
from benchmarks.summary import Summary
from benchmarks.training import TARGETS
from benchmarks.workloads import Kind, size_label

Entry = Mapping[str, Any]
PEERS = ("gloo", "nvflare", "flower")


def machine_line(entries: Sequence[Entry]) -> str:
    """Where, when and with what all this was measured."""
    machines = [entry["machine"] for entry in entries]
    facts = machines[-1]
    versions = {name: found for each in machines for name, found in each["packages"].items()}
    versions |= {name: found for entry in entries for name, found in entry.get("versions", {}).items()}
    times = sorted(each["measured_at"] for each in machines)
    when = times[0] if times[0][:10] == times[-1][:10] else f"{times[0]} to {times[-1]}"
    loads = [each["load_average_after"][0] for each in machines]
    packages = ", ".join(f"{name} {found}" for name, found in versions.items())
    return (
        f"*{when}: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}, {packages}; load average {min(loads)} to {max(loads)}"
        f"{speed_note(facts)}.*"
    )


def null_period_s(entries: Sequence[Entry], system: str, parameters: int) -> float | None:
    """Time from one round's end to the next one's, of a system's float32 rounds without training."""
    for entry in entries:
        is_same = entry["system"] == system and entry["parameters"] == parameters
        if is_same and (entry["codec"], entry["kind"]) == ("none", Kind.NULL):
            return period_s(entry)
    return None


def period_s(entry: Entry) -> float:
    """Median over its runs."""
    return Summary.of([run["period_s"] for run in entry["runs"]]).median


def seconds_of(entry: Entry) -> Summary:
    """All its rounds."""
    return Summary.of([value for run in entry["runs"] for value in run["seconds"]])


def peers(entries: Sequence[Entry]) -> str:
    """Rounds without training."""
    lines = [
        "### Rounds without training, side by side",
        "",
        "| parameters | system | codec | weights travel | rounds | seconds: median (range) | period s | CPU-s "
        "| server peak MB | times Gloo's period | Flower's period is times this | NVFlare's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(entries, key=lambda entry: (entry["parameters"], ("cortex", *PEERS).index(entry["system"])))
    return "\n".join(lines + [_peer_row(entry, entries) for entry in order])


def _peer_row(entry: Entry, entries: Sequence[Entry]) -> str:
    seconds, period = seconds_of(entry), period_s(entry)
    gloo, nvflare, flower = (null_period_s(entries, name, entry["parameters"]) for name in PEERS)
    peak = max(run["server_peak_bytes"] for run in entry["runs"])
    is_cortex = entry["system"] == "cortex"
    travel = "up" if is_cortex and entry["kind"] == Kind.NULL else "both ways"
    cells = (
        size_label(entry["parameters"]),
        entry["system"],
        entry["codec"],
        "all-reduce" if entry["system"] == "gloo" else travel,
        seconds.count,
        seconds.text(3 if seconds.median < 0.5 else 2),
        f"{period:.3f}",
        f"{Summary.of([sum(run['cpu_s'].values()) for run in entry['runs']]).median:.2f}",
        f"{peak / 1e6:.0f}" if peak else "",
        _ratio(period, gloo) if entry["system"] != "gloo" else "",
        _ratio(flower, period) if entry["system"] != "flower" else "",
        _ratio(nvflare, period) if entry["system"] != "nvflare" else "",
    )
    return row(cells)


def training(entries: Sequence[Entry]) -> str:
    """Seconds to an accuracy, medians over the runs."""
    goals = " | ".join(f"s to {target:.0%}" for target in TARGETS)
    lines = [
        "### Fashion-MNIST, 784-512-256-10, 4 workers",
        "",
        f"| system | algorithm | codec | runs | {goals} | rounds | last accuracy | CPU-s | others' cores |",
        "|---|---|---|---|" + "---|" * (len(TARGETS) + 4),
    ]
    return "\n".join(lines + [_training_row(entry) for entry in entries])


def _training_row(entry: Entry) -> str:
    runs = entry["runs"]
    last = Summary.of([run["points"][-1]["accuracy"] for run in runs])
    cells = (
        entry["system"],
        entry["algorithm"],
        entry["codec"],
        len(runs),
        *(_seconds_text(seconds_to(entry, target)) for target in TARGETS),
        f"{Summary.of([len(run['points']) for run in runs]).median:g}",
        f"{last.median:.4f}",
        f"{Summary.of([run['cpu_s'] for run in runs]).median:.0f}",
        f"{Summary.of([run['others_cores'] for run in runs]).median:.2f}",
    )
    return row(cells)


def seconds_to(entry: Entry, target: float) -> float | None:
    """Median time to an accuracy; None if a run did not reach it."""
    reached = [
        next((point["at_s"] for point in run["points"] if point["accuracy"] >= target), None) for run in entry["runs"]
    ]
    known = [each for each in reached if each is not None]
    return Summary.of(known).median if len(known) == len(reached) else None


def links(entries: Sequence[Entry]) -> str:
    """Seconds of a round over a shaped line."""
    lines = [
        "### Slow lines: 4 simulated workers, each behind a line of its own",
        "",
        "| parameters | codec | Mbit/s | round trip ms | seconds: median (range) | the line alone s | of its rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        seconds = Summary.of([each["seconds"] for each in entry["rounds_measured"]])
        cells = (
            size_label(entry["parameters"]),
            entry["codec"],
            f"{entry['mbit_per_s']:g}",
            f"{1000 * entry['round_trip_s']:g}",
            seconds.text(),
            f"{entry['least_s']:.2f}",
            f"{entry['least_s'] / seconds.median:.0%}",
        )
        lines.append(row(cells))
    return "\n".join(lines)


def sealing(entries: Sequence[Entry]) -> str:
    """Sealed against unsealed."""
    lines = [
        "### Sealed against unsealed (AES-256-GCM replaced by a copy), null rounds, 4 workers",
        "",
        "| parameters | codec | sealed s: median (range) | unsealed s | of its throughput | CPU-s sealed / not |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        both = {
            name: Summary.of([value for run in entry[name] for value in run["seconds"]])
            for name in ("sealed", "unsealed")
        }
        cpu = [
            Summary.of([sum(run["cpu_s"].values()) for run in entry[name]]).median for name in ("sealed", "unsealed")
        ]
        cells = (
            size_label(entry["parameters"]),
            entry["codec"],
            both["sealed"].text(3),
            both["unsealed"].text(3),
            f"{both['unsealed'].median / both['sealed'].median:.2f}",
            f"{cpu[0]:.2f} / {cpu[1]:.2f}",
        )
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: Iterable[object]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _ratio(above: float | None, below: float | None) -> str:
    return f"{above / below:.1f}" if above and below else ""


def _seconds_text(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.1f}"
