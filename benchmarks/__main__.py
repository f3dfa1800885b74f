"""`python -m benchmarks`: everything, or one measurement with its own settings."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from benchmarks import channel as channel_cost
from benchmarks import channel_return, channel_silence, comparison, plots, results, startup
from benchmarks import codecs as codec_speed
from benchmarks import links as slow_links
from benchmarks import memory as memory_cost
from benchmarks import regions as across
from benchmarks import sealing as sealed_rounds
from benchmarks import worker_memory as worker_cost
from benchmarks.contestants import CONTESTANTS
from benchmarks.machine import describe
from benchmarks.network import BenchmarkError
from benchmarks.store import PartialResults
from benchmarks.workloads import Kind, Workload, parse_size, size_label
from cortex_common.codec import CODECS
from cortex_common.errors import CortexError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Sizes = Annotated[str, typer.Option("--parameters", "-p", help="Model sizes, e.g. 1M,10M.")]
Codecs = Annotated[str, typer.Option("--codecs", "-c", help="Codecs of the updates, e.g. none,int8.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count.")]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="How often, each time with fresh processes.")]
_ALL_SYSTEMS = ",".join(comparison.SYSTEMS)
_ALL_CODECS = ",".join(CODECS)
Only = Annotated[str, typer.Option("--only", help=f"Of {', '.join(comparison.SYSTEMS)}.")]
Out = Annotated[Path, typer.Option("--out", help="Where the JSON files go.")]


@app.command(name="all")
def everything() -> None:
    """All measurements with their defaults, and the tables."""
    rounds()
    peers()
    training()
    memory()
    worker_memory()
    links()
    sealing()
    regions()
    channel()
    codecs()
    start()
    table()
    draw()


@app.command()
def rounds(
    parameters: Sizes = "1k,1M,10M,50M",
    codecs: Codecs = "none,int8",
    kinds: Annotated[str, typer.Option(help="null, exchange, or both.")] = "null,exchange",
    workers: Annotated[str, typer.Option("--workers", "-n", help="Numbers of workers, e.g. 4,8.")] = "4",
    rounds: Rounds = 6,
    repeat: Repeat = 2,
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(CONTESTANTS)}.")] = "cortex",
    out: Out = results.RESULTS,
) -> None:
    """Seconds, CPU-seconds and bytes of a round, with real workers."""
    machine, entries = describe(), []
    for system, count, size in product(systems.split(","), _numbers(workers), _sizes(parameters)):
        cases = [
            Workload(size, codec, Kind(kind), count, rounds) for codec in codecs.split(",") for kind in kinds.split(",")
        ]
        entries += _compared(system, cases, repeat)
        results.save("rounds", machine, entries, out)


def _compared(system: str, cases: Sequence[Workload], repeat: int) -> list[dict[str, Any]]:
    """All cases of one size on the same network; each repetition on a fresh one."""
    runs: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(repeat):
        with CONTESTANTS[system](cases[0].workers) as contestant:
            for case, found in zip(cases, runs, strict=True):
                measured = contestant.run(case)
                found.append(asdict(measured))
                _say(f"{system} {case.label}", measured.seconds)
    return [{"system": system, **asdict(case), "runs": found} for case, found in zip(cases, runs, strict=True)]


@app.command()
def peers(
    parameters: Sizes = "1M,10M,50M",
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")] = 4,
    rounds: Rounds = 6,
    only: Only = _ALL_SYSTEMS,
    out: Out = results.RESULTS,
) -> None:
    """Rounds without training: Cortex beside other systems."""
    store = PartialResults(out / "peers.json", comparison.NULL_KEY)
    for size in _sizes(parameters):
        comparison.compare_null(_systems(only), size, workers, rounds, store, _say)


@app.command()
def training(
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")] = 4,
    repeat: Repeat = 3,
    only: Only = _ALL_SYSTEMS,
    out: Out = results.RESULTS,
) -> None:
    """Seconds to train Fashion-MNIST to an accuracy: Cortex beside other systems."""
    store = PartialResults(out / "training.json", comparison.TRAINING_KEY)
    comparison.compare_training(_systems(only), workers, repeat, store, _say)


@app.command()
def memory(
    parameters: Sizes = "1M,10M,50M",
    codecs: Codecs = "none,int8",
    workers: Annotated[str, typer.Option("--workers", "-n", help="Numbers of simulated workers.")] = "4,16,64",
    rounds: Rounds = 2,
    repeat: Repeat = 1,
    out: Out = results.RESULTS,
) -> None:
    """Peak memory of an aggregator under simulated workers."""
    store = PartialResults(out / "memory.json", memory_cost.MEMORY_KEY)
    for size, codec, count in product(_sizes(parameters), codecs.split(","), _numbers(workers)):
        machine, workload = describe(), Workload(size, codec, Kind.EXCHANGE, count, rounds)
        costs = [memory_cost.measure(workload) for _ in range(repeat)]
        for cost in costs:
            _say(f"{workload.label}: peak {cost.peak_bytes / 1e6:.0f} MB", [each.seconds for each in cost.rounds])
        store.put({**asdict(workload), "uploaders": "simulated", "runs": [asdict(cost) for cost in costs]}, machine)


@app.command()
def worker_memory(
    parameters: Sizes = "10M,50M",
    codecs: Codecs = _ALL_CODECS,
    out: Out = results.RESULTS,
) -> None:
    """Peak memory of a worker in rounds, above what training alone takes."""
    store = PartialResults(out / "worker_memory.json", worker_cost.WORKER_MEMORY_KEY)
    machine = describe()
    for entry in worker_cost.measure(list(_sizes(parameters)), codecs.split(",")):
        store.put(entry, machine)
        typer.echo(worker_cost.row(entry), err=True)


@app.command()
def links(
    parameters: Sizes = "1M",
    codecs: Codecs = "none,int8,int4",
    rates: Annotated[str, typer.Option(help="Mbit/s of each worker's line.")] = "10,100,1000",
    round_trips: Annotated[str, typer.Option(help="Milliseconds.")] = "1,50,200",
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of simulated workers.")] = 4,
    rounds: Rounds = 3,
    out: Out = results.RESULTS,
) -> None:
    """Seconds of a round against the rate and round trip of the workers' lines."""
    store = PartialResults(out / "links.json", slow_links.LINK_KEY)
    for size, codec in product(_sizes(parameters), codecs.split(",")):
        for rate, trip in product(_numbers(rates), _numbers(round_trips)):
            machine, workload = describe(), Workload(size, codec, Kind.EXCHANGE, workers, rounds)
            cost = slow_links.measure(workload, rate, trip / 1000)
            line = {"mbit_per_s": rate, "round_trip_s": trip / 1000, "least_s": cost.least_s}
            measured = [asdict(each) for each in cost.rounds]
            store.put({**asdict(workload), **line, "rounds_measured": measured}, machine)
            _say(f"{workload.label}, {rate} Mbit/s, {trip} ms", [each.seconds for each in cost.rounds])


@app.command()
def regions(
    parameters: Sizes = "10M",
    codecs: Codecs = "none",
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")] = 6,
    regions: Annotated[int, typer.Option(min=2, help="Number of regions, of as many workers each.")] = 2,
    rounds: Rounds = 6,
    out: Out = results.RESULTS,
) -> None:
    """Bytes between regions and seconds of a round, with an aggregator for all and with one in each region."""
    store, machine = PartialResults(out / "regions.json", across.REGIONS_KEY), describe()
    for entry in across.measure(list(_sizes(parameters)), codecs.split(","), workers, regions, rounds):
        store.put(entry, machine)
        _say(f"{size_label(entry['parameters'])} {entry['codec']} {entry['topology']}", entry["seconds"])


@app.command()
def channel(
    megabytes: Annotated[int, typer.Option(min=1, help="MB of each transfer.")] = 200,
    repeat: Repeat = 5,
    line: Annotated[str, typer.Option(help="Mbit/s and milliseconds of round trip, e.g. 100:200.")] = "100:200",
    only: Annotated[str, typer.Option(help="Names of variants, or parts of them, with commas; none: all.")] = "",
    out: Out = results.RESULTS,
) -> None:
    """Each gRPC option that is set, against its default."""
    store = PartialResults(out / "channel.json", channel_cost.CHANNEL_KEY)
    machine = describe()
    rate, trip = _line(line)
    chosen = channel_cost.variants(only.split(","))
    entries = channel_cost.measure(chosen, megabytes, repeat)
    entries += channel_cost.measure_line(chosen, rate, trip / 1000, 8.0)
    for entry in entries:
        store.put(entry, machine)
    typer.echo(channel_cost.table(entries), err=True)
    store = PartialResults(out / "channel_return.json", channel_return.RETURN_KEY)
    entries = channel_return.measure(away_s=10.0, repeat=3)
    for entry in entries:
        store.put(entry, machine)
    typer.echo(channel_return.table(entries), err=True)
    store = PartialResults(out / "channel_silence.json", channel_silence.SILENCE_KEY)
    entries = channel_silence.measure(limit_s=150.0)
    for entry in entries:
        store.put(entry, machine)
    typer.echo(channel_silence.table(entries), err=True)


@app.command()
def sealing(
    parameters: Sizes = "10M",
    codecs: Codecs = "none,int8",
    rounds: Rounds = 8,
    repeat: Repeat = 2,
    out: Out = results.RESULTS,
) -> None:
    """Rounds that are sealed against rounds that are not."""
    store = PartialResults(out / "sealing.json", sealed_rounds.SEALING_KEY)
    for size in _sizes(parameters):
        machine = describe()
        cases = [Workload(size, codec, Kind.NULL, 4, rounds, warm_up=2) for codec in codecs.split(",")]
        for entry in sealed_rounds.measure(cases, repeat):
            store.put(entry, machine)
            for name in ("sealed", "unsealed"):
                label = f"{size_label(size)} {entry['codec']} {name}"
                _say(label, [value for run in entry[name] for value in run["seconds"]])


@app.command()
def codecs(out: Out = results.RESULTS) -> None:
    """Throughput of each codec beside memcpy."""
    codec_speed.run_apart(out / "codecs.json")


@app.command()
def start(repeat: Repeat = 3, out: Out = results.RESULTS) -> None:
    """From `cortex up` to the end of the first round."""
    machine, entries = describe(), []
    for cost in startup.repeated(repeat):
        entries.append(asdict(cost))
        _say(f"start: up {cost.up_s:.1f} s, first round {cost.first_round_s:.1f} s, then", [cost.later_seconds.median])
    results.save("start", machine, entries, out)


@app.command()
def table(source: Annotated[Path, typer.Option("--from", help="Where the JSON files are.")] = results.RESULTS) -> None:
    """Write the tables into the README, from the results there are."""
    typer.echo(results.write_tables(source))


@app.command(name="plots")
def draw(source: Annotated[Path, typer.Option("--from", help="Where the JSON files are.")] = results.RESULTS) -> None:
    """Draw a picture of each result there is."""
    try:
        for path in plots.draw(source):
            typer.echo(path)
    except ImportError as error:
        raise BenchmarkError(f"{error.name} is missing; get it with: pip install '.[bench]'") from None


def _sizes(text: str) -> Iterator[int]:
    try:
        yield from [parse_size(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"parameters: {error}; allowed are numbers such as 1k, 250000 or 10M") from None


def _systems(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in comparison.SYSTEMS]:
        raise typer.BadParameter(f"only: {unknown[0]!r} given; allowed: {', '.join(comparison.SYSTEMS)}")
    return chosen


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"workers {text!r}; allowed are whole numbers with commas") from None


def _line(text: str) -> tuple[int, int]:
    rate, _, trip = text.partition(":")
    try:
        return int(rate), int(trip)
    except ValueError:
        raise typer.BadParameter(f"line {text!r}; allowed is Mbit/s:milliseconds, such as 100:200") from None


def _say(what: str, seconds: Sequence[float]) -> None:
    shown = ", ".join(f"{value:.3f}" if value < 0.5 else f"{value:.2f}" for value in seconds)
    typer.echo(f"{what}: {shown} s", err=True)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End as on an error, so that everything that was started is stopped."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except (BenchmarkError, CortexError) as error:
        sys.exit(f"error: {error}")
