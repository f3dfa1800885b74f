"""Dashboards and alert rules, as far as no server is needed."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring import DASHBOARDS, DEPLOY, PROMTOOL, has_numbers, metrics_in, queries

ROOT = DEPLOY.parent
RULES = DEPLOY / "prometheus" / "rules.yml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="NO PROMTOOL ON THIS MACHINE: alert rules were not tested (Debian: apt install prometheus)"
)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def documented_metrics() -> set[str]:
    return metrics_in((ROOT / "docs" / "operations.md").read_text())


def recorded() -> set[str]:
    return {rule["record"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}


def test_the_dashboards_are_the_ones_their_source_makes() -> None:
    before = {path.name: path.read_text() for path in DASHBOARDS}
    every = "{f'{name}.json': dashboards.text_of(board) for name, board in dashboards.ALL.items()}"
    source = f"import dashboards, json; print(json.dumps({every}))"
    made = subprocess.run(
        ["python3", "-c", source], cwd=DEPLOY / "grafana", check=True, text=True, stdout=subprocess.PIPE
    )
    assert json.loads(made.stdout) == before, "run python deploy/grafana/dashboards.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_places_of_their_own(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] + panel["type"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (path.stem, one, other)


def test_uids_and_titles_are_different() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards) == 5


def test_queries_and_rules_name_only_metrics_that_there_are() -> None:
    texts = [query.expression for query in queries()] + [RULES.read_text(), ALERTS.read_text()]
    named = {name for text in texts for name in metrics_in(text)}
    own = {name for name in named if name.startswith("cortex")}
    assert own - documented_metrics() - recorded() == set()


def test_what_every_program_tells_prometheus_is_asked_of_cortex_only() -> None:
    """A cluster's Prometheus knows others too."""
    named = '{job=~"coordinator|discovery|gateway|aggregator|worker"}'
    found = [re.findall(r"\b(?:up|process_\w+)\b(\{[^}]*\})?", query.expression) for query in queries()]
    asked = [labels for each in found for labels in each]
    assert len(asked) == 3
    assert set(asked) == {named}


def test_a_series_of_nothing_but_nan_is_no_data() -> None:
    assert not has_numbers({"metric": {}, "value": [1.0, "NaN"]})
    assert not has_numbers({"metric": {}, "values": [[1.0, "NaN"], [2.0, "NaN"]]})
    assert has_numbers({"metric": {}, "value": [1.0, "0"]})
    assert has_numbers({"metric": {}, "values": [[1.0, "NaN"], [2.0, "0.5"]]})


def test_every_alert_has_a_runbook_a_severity_and_a_test() -> None:
    headings = set(re.findall(r"^#+ `?(Cortex\w+)`?", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE))
    tests = (DEPLOY / "prometheus" / "rules_test.yml").read_text()
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f"alertname: {alert['alert']}\n" in tests, alert["alert"]
    assert {alert["alert"] for alert in alerts()} == headings


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", "rules_test.yml"],
        cwd=DEPLOY / "prometheus",
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout


@needs_promtool
def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus", str(DEPLOY / "prometheus")))
    done = subprocess.run(
        [str(PROMTOOL), "check", "config", str(tmp_path / "prometheus.yml")],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
