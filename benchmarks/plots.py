"""Results as pictures: `results/plots/*.svg`. Needs the extra `bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison_tables import period_s
from benchmarks.memory import allowed_bytes
from benchmarks.summary import Summary
from benchmarks.workloads import Kind, size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]
_COLOURS = {"cortex": "tab:blue", "gloo": "tab:gray", "nvflare": "tab:green", "flower": "tab:orange"}
_SHADES = {"none": 1.0, "int8": 0.7, "int4": 0.45}
_STYLES = {"fedavg": "-", "diloco": "--", "ddp": ":"}


def draw(results: Path) -> list[Path]:
    """A picture of each result there is.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "cortex", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
    out = results / "plots"
    out.mkdir(parents=True, exist_ok=True)
    return [_save(path, picture, out) for path, picture in _found(results)]


def _found(results: Path) -> list[tuple[Path, Callable[[Axes, Any], None]]]:
    paths = [(results / f"{kind}.json", picture) for kind, picture in _PICTURES.items()]
    return [(path, picture) for path, picture in paths if path.exists()]


def _save(path: Path, picture: Callable[[Axes, Any], None], out: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    picture(axes, json.loads(path.read_text()))
    to = out / f"{path.stem}.svg"
    figure.savefig(to, metadata={"Date": None})
    pyplot.close(figure)
    return to


def _peers(axes: Axes, document: Entry) -> None:
    entries = [entry for entry in document["results"] if entry["kind"] == Kind.NULL]
    sizes = sorted({entry["parameters"] for entry in entries})
    bars = [("cortex", codec) for codec in _SHADES] + [(name, "none") for name in ("gloo", "nvflare", "flower")]
    width = 0.8 / len(bars)
    for place, (system, codec) in enumerate(bars):
        chosen = {
            entry["parameters"]: period_s(entry)
            for entry in entries
            if (entry["system"], entry["codec"]) == (system, codec)
        }
        at = [index + (place - len(bars) / 2 + 0.5) * width for index, size in enumerate(sizes) if size in chosen]
        heights = [chosen[size] for size in sizes if size in chosen]
        label = f"{system}, {codec}" if system == "cortex" else system
        drawn = axes.bar(at, heights, width, label=label, color=_COLOURS[system], alpha=_SHADES[codec])
        axes.bar_label(drawn, [f"{height:.2g}" for height in heights], fontsize=7)
    axes.set_xticks(range(len(sizes)), [size_label(size) for size in sizes])
    axes.set(yscale="log", xlabel="parameters", ylabel="seconds a round", title="Round without training, 4 workers")
    axes.legend()


def _training(axes: Axes, document: Entry) -> None:
    for entry in document["results"]:
        points = _middle_run(entry["runs"])["points"]
        axes.plot(
            [point["at_s"] for point in points],
            [point["accuracy"] for point in points],
            _STYLES[entry["algorithm"]],
            marker=".",
            color=_COLOURS[entry["system"]],
            alpha=_SHADES[entry["codec"]],
            label=f"{entry['system']}, {entry['algorithm']}, {entry['codec']}",
        )
    axes.set(xscale="log", ylim=(0.7, 0.9), xlabel="seconds since the submission", ylabel="test accuracy")
    axes.set_title("Fashion-MNIST, 4 workers")
    axes.legend(fontsize=7)


def _memory(axes: Axes, document: Entry) -> None:
    entries = sorted(document["results"], key=lambda entry: (entry["parameters"], entry["codec"], entry["workers"]))
    for (parameters, codec), group in groupby(entries, lambda entry: (entry["parameters"], entry["codec"])):
        chosen = list(group)
        workers = [entry["workers"] for entry in chosen]
        peaks = [max(run["peak_bytes"] for run in entry["runs"]) / 1e6 for entry in chosen]
        drawn = axes.plot(workers, peaks, marker="o", label=f"{size_label(parameters)}, {codec}")
        if codec == "none":
            bound = [allowed_bytes(parameters, count) / 1e6 for count in workers]
            axes.plot(workers, bound, ":", color=drawn[0].get_color(), label=f"{size_label(parameters)}, allowed")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="MB", title="Peak memory of the aggregator")
    axes.set_xticks(*_ticks([entry["workers"] for entry in entries]), minor=False)
    axes.legend(fontsize=7)


def _links(axes: Axes, document: Entry) -> None:
    entries = sorted(document["results"], key=_line)
    for (codec, trip), group in groupby(entries, _line):
        chosen = sorted(group, key=lambda entry: entry["mbit_per_s"])
        seconds = [Summary.of([each["seconds"] for each in entry["rounds_measured"]]).median for entry in chosen]
        label = f"{codec}, {1000 * trip:g} ms"
        axes.plot([entry["mbit_per_s"] for entry in chosen], seconds, marker=".", label=label)
    size = size_label(entries[0]["parameters"])
    axes.set(xscale="log", yscale="log", xlabel="Mbit/s of each worker's line", ylabel="seconds a round")
    axes.set_title(f"{size} parameters, both ways, 4 workers, by codec and round trip")
    axes.set_xticks(*_ticks([entry["mbit_per_s"] for entry in entries]), minor=False)
    axes.legend(fontsize=7)


def _codecs(axes: Axes, document: Entry) -> None:
    rows = [row for row in document["codecs"] if row["engine"] == document["codecs"][-1]["engine"]]
    for place, what in enumerate(("encode", "decode_add")):
        at = [index + (place - 0.5) * 0.4 for index in range(len(rows))]
        axes.bar(at, [row[what] for row in rows], 0.4, label=what.replace("_", " and "))
    axes.axhline(document["memcpy"], color="black", linestyle=":", label="memcpy")
    names = ["\n".join([row["codec"], *(f"{name} {value}" for name, value in row["options"].items())]) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(ylabel="GB/s of float32, one thread", title="Codecs")
    axes.legend()


def _middle_run(runs: Sequence[Entry]) -> Entry:
    """The one that took neither longest nor shortest."""
    return sorted(runs, key=lambda run: float(run["points"][-1]["at_s"]))[(len(runs) - 1) // 2]


def _line(entry: Entry) -> tuple[str, float]:
    return entry["codec"], entry["round_trip_s"]


def _ticks(values: Sequence[float]) -> tuple[list[float], list[str]]:
    known = sorted(set(values))
    return known, [f"{value:g}" for value in known]


_PICTURES: Mapping[str, Callable[[Axes, Any], None]] = {
    "peers": _peers,
    "training": _training,
    "memory": _memory,
    "links": _links,
    "codecs": _codecs,
}
