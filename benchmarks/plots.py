"""Results as pictures: `results/plots/*.svg`. Needs the extra `bench`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison_tables import period_s
from benchmarks.memory import allowed_bytes
from benchmarks.summary import Summary
from benchmarks.workloads import Kind, size_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Entry = Mapping[str, Any]
_COLOURS = {"cortex": "tab:blue", "gloo": "tab:gray", "nvflare": "tab:green", "flower": "tab:orange"}
_SHADES = {"none": 1.0, "int8": 0.7, "int4": 0.45}
_STYLES = {"fedavg": "-", "diloco": "--", "ddp": ":"}
_CODEC_STYLES = {"none": "solid", "bf16": (0, (7, 1)), "int8": "dashed", "int4": "dotted", "topk": "dashdot"}
_CYCLE = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


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
        axes.bar_label(drawn, [f"{height:#.2g}".rstrip(".") for height in heights], fontsize=6)
    axes.set_xticks(range(len(sizes)), [size_label(size) for size in sizes])
    axes.set(yscale="log", xlabel="parameters", ylabel="seconds a round", title="Round without training, 4 workers")
    _plain_numbers(axes.yaxis)
    axes.legend(fontsize=7)


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
    axes.set(xscale="log", ylim=(0.75, 0.89), xlabel="seconds since the submission", ylabel="test accuracy")
    axes.set_title("Fashion-MNIST, 4 workers")
    _plain_numbers(axes.xaxis)
    axes.legend(fontsize=7, loc="lower right", handlelength=4)


def _memory(axes: Axes, document: Entry) -> None:
    entries = sorted(document["results"], key=lambda entry: (entry["parameters"], entry["codec"], entry["workers"]))
    colours = _colours([entry["parameters"] for entry in entries])
    for (parameters, codec), group in groupby(entries, lambda entry: (entry["parameters"], entry["codec"])):
        chosen = list(group)
        workers = [entry["workers"] for entry in chosen]
        peaks = [max(run["peak_bytes"] for run in entry["runs"]) / 1e6 for entry in chosen]
        size, colour = size_label(parameters), colours[parameters]
        style = _CODEC_STYLES[codec]
        axes.plot(workers, peaks, linestyle=style, marker=".", color=colour, label=f"{size}, {codec}")
        if codec == "none":
            bound = [allowed_bytes(parameters, count) / 1e6 for count in workers]
            axes.plot(workers, bound, color=colour, linewidth=4, alpha=0.25, label=f"{size}, allowed")
    axes.set(xscale="log", ylim=(0, None), xlabel="workers", ylabel="MB", title="Peak memory of the aggregator")
    _only_ticks(axes, [entry["workers"] for entry in entries])
    _legend_beside(axes)


def _links(axes: Axes, document: Entry) -> None:
    entries = sorted(document["results"], key=_line)
    colours = _colours([entry["round_trip_s"] for entry in entries])
    for (codec, trip), group in groupby(entries, _line):
        chosen = sorted(group, key=lambda entry: entry["mbit_per_s"])
        seconds = [Summary.of([each["seconds"] for each in entry["rounds_measured"]]).median for entry in chosen]
        rates, label = [entry["mbit_per_s"] for entry in chosen], f"{codec}, {1000 * trip:g} ms"
        axes.plot(rates, seconds, linestyle=_CODEC_STYLES[codec], marker=".", color=colours[trip], label=label)
    size = size_label(entries[0]["parameters"])
    axes.set(xscale="log", yscale="log", xlabel="Mbit/s of each worker's line", ylabel="seconds a round")
    axes.set_title(f"{size} parameters, both ways, 4 workers, by codec and round trip")
    _only_ticks(axes, [entry["mbit_per_s"] for entry in entries])
    _plain_numbers(axes.yaxis)
    _legend_beside(axes)


def _codecs(axes: Axes, document: Entry) -> None:
    engine = document["codecs"][-1]["engine"]
    rows = [row for row in document["codecs"] if row["engine"] == engine]
    for place, what in enumerate(("encode", "decode_add")):
        at = [index + (place - 0.5) * 0.4 for index in range(len(rows))]
        axes.bar(at, [row[what] for row in rows], 0.4, label=what.replace("_", " and "))
    axes.axhline(document["memcpy"], color="black", linestyle=":", label="memcpy")
    names = ["\n".join([row["codec"], *map(_option, row["options"].items())]) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(ylabel="GB/s of float32, one thread", title=f"Codecs on {engine}, from memory and to memory")
    _legend_beside(axes)


def _option(item: tuple[str, object]) -> str:
    name, value = item
    return name if value is True else f"{name} {value}"


def _middle_run(runs: Sequence[Entry]) -> Entry:
    """The one that took neither longest nor shortest."""
    return sorted(runs, key=lambda run: float(run["points"][-1]["at_s"]))[(len(runs) - 1) // 2]


def _line(entry: Entry) -> tuple[str, float]:
    return entry["codec"], entry["round_trip_s"]


def _colours(values: Sequence[float]) -> dict[float, str]:
    return dict(zip(sorted(set(values)), cycle(_CYCLE), strict=False))


def _only_ticks(axes: Axes, values: Sequence[float]) -> None:
    """What was measured, and nothing between."""
    known = sorted(set(values))
    axes.set_xticks(known, [f"{value:g}" for value in known])
    axes.set_xticks([], minor=True)


def _plain_numbers(axis: Axis) -> None:
    """0.1 and 20 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_beside(axes: Axes) -> None:
    """Where it covers nothing."""
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4)


_PICTURES: Mapping[str, Callable[[Axes, Any], None]] = {
    "peers": _peers,
    "training": _training,
    "memory": _memory,
    "links": _links,
    "codecs": _codecs,
}
