"""Results that are measured part by part, and the table of targets made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import comparison, comparison_tables, plots, targets
from benchmarks.__main__ import app
from benchmarks.comparison import NULL_KEY, SYSTEMS, TRAINING_KEY, null_cases
from benchmarks.comparison_tables import machine_line, seconds_to
from benchmarks.machine import describe, load_average
from benchmarks.memory import allowed_bytes
from benchmarks.network import BenchmarkError
from benchmarks.peers.tasks import STEP, Event, check_counted, null_shapes
from benchmarks.results import RESULTS, write_tables
from benchmarks.store import PartialResults
from benchmarks.training import TARGETS, Algorithm, Curve, Point, TrainingTask
from benchmarks.workloads import Kind


def _null(system: str, codec: str, seconds: float, parameters: int = 10_000_000) -> dict[str, Any]:
    run = {"seconds": [seconds] * 5, "period_s": seconds, "cpu_s": {"all": 1.0}, "server_peak_bytes": 10**8}
    names = {"system": system, "parameters": parameters, "codec": codec, "kind": Kind.NULL.value, "workers": 4}
    return {**names, "versions": {}, "runs": [run]}


def _training(system: str, algorithm: str, *at_s: float) -> dict[str, Any]:
    points = [{"at_s": at, "accuracy": accuracy} for at, accuracy in zip(at_s, TARGETS, strict=False)]
    run = {"points": points, "cpu_s": 1.0, "others_cores": 0.0}
    return {"system": system, "algorithm": algorithm, "codec": "none", "workers": 4, "runs": [run]}


class Trained:
    """A system that takes 9 s at first, then 2, then 4."""

    versions: Mapping[str, str] = {}

    def __init__(self, started: list[Trained]) -> None:
        self._takes_s = (9.0, 2.0, 4.0)[len(started)]
        started.append(self)

    def train(self, _training: TrainingTask) -> Curve:
        return Curve([Point(self._takes_s, TARGETS[-1])], cpu_s=1.0, others_cores=0.0)


def _rows(table: str | None) -> dict[str, tuple[str, str, str]]:
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[4:]]
    return {work: (target, measured, verdict) for work, target, measured, verdict in cells}


def test_a_part_measured_again_replaces_that_part_only(tmp_path: Path) -> None:
    store = PartialResults(tmp_path / "peers.json", NULL_KEY)
    for entry in (_null("cortex", "none", 0.5), _null("flower", "none", 14.0), _null("cortex", "none", 0.4)):
        store.put(entry, describe())
    found = [(entry["system"], entry["runs"][0]["period_s"]) for entry in store.read()]
    assert found == [("cortex", 0.4), ("flower", 14.0)]


def test_ratios_are_taken_from_the_same_size_and_judged() -> None:
    entries = [
        _null("cortex", "int8", 0.2),
        _null("gloo", "none", 0.1),
        _null("nvflare", "none", 2.0),
        _null("flower", "none", 14.0),
        _null("flower", "none", 1.0, parameters=1_000_000),
    ]
    rows = _rows(targets.table({"peers": entries}))
    name = "null round 10M int8 sealed, 4 workers"
    assert rows[name] == ("≤ 0.3 s", "0.200 s", "met")
    assert rows[f"{name}: faster than flower"] == ("≥ 45×", "70×", "met")
    assert rows[f"{name}: faster than nvflare"] == ("≥ 12×", "10×", "**missed**")
    assert rows[f"{name}: of a Gloo all-reduce of the float32 vector"] == ("≤ 3×", "2.00×", "met")
    assert len(rows) == 4


def test_an_accuracy_that_a_peer_never_reaches_is_said_to_be_so() -> None:
    entries = [_training("cortex", "fedavg", 4.0, 9.0, 20.0), _training("flower", "fedavg", 40.0, 100.0)]
    rows = _rows(targets.table({"training": entries}))
    assert rows["Fashion-MNIST to 85%, FedAvg: share of the time of flower"] == ("≤ 0.125×", "0.090×", "met")
    assert rows["Fashion-MNIST to 87%"][1] == "flower does not reach it"


def test_tables_and_pictures_are_made_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = PartialResults(tmp_path / "peers.json", NULL_KEY)
    for system in SYSTEMS:
        store.put(_null(system, "none", 1.0), describe())
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    front = tmp_path / "front.md"
    front.write_text("# Cortex\n<!-- results: begin -->\nold\n<!-- results: end -->\n")
    write_tables(tmp_path, readme, front)
    assert "old" not in front.read_text()
    assert "of a Gloo all-reduce" in front.read_text()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| 10M |") == len(SYSTEMS)
    assert [path.name for path in plots.draw(tmp_path)] == ["peers.svg"]
    assert "<svg" in (tmp_path / "plots" / "peers.svg").read_text()


def test_every_result_there_is_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert {path.stem for path in plots.draw(tmp_path)} == {"peers", "training", "memory", "links", "codecs"}


def test_numbers_of_workers_that_were_measured_are_told_and_no_others() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    case = {"parameters": 10_000_000, "codec": "none", "runs": [{"peak_bytes": 10**8}]}
    plots._memory(axes, {"results": [{**case, "workers": count} for count in (4, 16, 64)]})
    figure.canvas.draw()
    shown = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True))]
    pyplot.close(figure)
    assert shown == ["4", "16", "64"]


def test_a_table_says_how_fast_a_core_was() -> None:
    facts = {**describe(), "load_average_after": load_average()}
    speed = facts["speed"]
    assert min(speed.values()) > 0
    line = machine_line([{"machine": facts}])
    assert f"SHA-256 {speed['sha256_gb_per_s']:g} GB/s" in line
    earlier = {name: value for name, value in facts.items() if name != "speed"}
    assert "SHA-256" not in machine_line([{"machine": earlier}])


def test_a_round_that_left_a_client_out_is_no_round() -> None:
    whole = [Event(number, float(number), number * STEP * 2.5, None, None) for number in range(3)]
    check_counted(whole, workers=4)
    short = [whole[0], Event(1, 1.0, STEP * 2.0, None, None)]
    with pytest.raises(BenchmarkError, match="not every update counted"):
        check_counted(short, workers=4)


def test_everybody_gets_a_model_of_the_same_size() -> None:
    elements = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in null_shapes(10_000_000))
    assert abs(elements / 10_000_000 - 1) < 0.05
    for system in SYSTEMS:
        assert {case.parameters for case in null_cases(system, 10_000_000, 4, 6)} == {10_000_000}


def test_everybody_trains_with_the_same_settings(tmp_path: Path) -> None:
    task = TrainingTask(tmp_path, Algorithm.DILOCO)
    job, fields = task.job(), json.loads(json.dumps(task.peer_fields()))
    assert job["training"]["local_steps"] == fields["every"] == 100
    assert (job["training"]["batch_size"], job["training"]["learning_rate"]) == (32, 4e-4)
    assert (fields["batch_size"], fields["learning_rate"]) == (32, 4e-4)
    assert job["training"]["rounds"] == fields["rounds"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_largest_model_has_as_many_rounds_as_the_others(system: str) -> None:
    assert {case.rounds for case in null_cases(system, 50_000_000, 4, 6)} == {6}


def test_training_is_the_median_of_three_on_fresh_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Trained] = []
    monkeypatch.setattr(comparison, "SYSTEMS", {"gloo": lambda _workers: nullcontext(Trained(started))})
    monkeypatch.setattr(comparison, "write_examples", lambda directory, _workers: directory)
    assert CliRunner().invoke(app, ["training", "--only", "gloo", "--out", str(tmp_path)]).exit_code == 0
    entries = PartialResults(tmp_path / "training.json", TRAINING_KEY).read()
    assert len(started) == 3
    assert [[run["points"][0]["at_s"] for run in entry["runs"]] for entry in entries] == [[9.0, 2.0, 4.0]] * 3
    assert [seconds_to(entry, TARGETS[-1]) for entry in entries] == [4.0] * 3
    rows = comparison_tables.training(entries).splitlines()[4:]
    assert [row.split(" | ")[3:5] for row in rows] == [["3", "4.0"]] * 3


def test_memory_is_allowed_for_parameters_and_workers() -> None:
    assert allowed_bytes(1_000_000, 4) == 13_000_000 + 300_000_000 + 20_000_000
