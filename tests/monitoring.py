"""A real Prometheus over a local network, and what Grafana would ask it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cortex.local.members import Member
from tests.waiting import until

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
_NAMES = re.compile(r"\b(?:cortex|process|python)_[a-z0-9_]+\b|\bcortex:[a-z0-9_:]+")


@dataclass(frozen=True)
class Query:
    """One query of one panel."""

    dashboard: str
    panel: str
    expression: str
    is_instant: bool

    @property
    def label(self) -> str:
        """For the name of a test."""
        return f"{self.dashboard}: {self.panel}"


def queries() -> list[Query]:
    """Those of all dashboards."""
    return [
        Query(path.stem, panel["title"], target["expr"], target["instant"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


def variables() -> list[str]:
    """The queries of the dashboards' variables."""
    every = [json.loads(path.read_text())["templating"]["list"] for path in DASHBOARDS]
    return [variable["query"]["query"] for some in every for variable in some if variable["type"] == "query"]


def metrics_in(text: str) -> set[str]:
    """Names of metrics and recorded figures in PromQL, without the endings that histograms add."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in _NAMES.findall(text)}


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of the API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def answers(self, query: Query, from_s: float, to_s: float) -> list[Any]:
        """What Grafana would draw for a panel's query that shows this time: series with any number but NaN."""
        text = query.expression.replace("$__rate_interval", "8s").replace("$__range", f"{int(to_s - from_s)}s")
        text = re.sub(r"\$\w+", ".*", text)
        if query.is_instant:
            found = self.ask("query", query=text, time=to_s)
        else:
            found = self.ask("query_range", query=text, start=from_s, end=to_s, step=1)
        return [series for series in found["result"] if has_numbers(series)]


def has_numbers(series: Mapping[str, Any]) -> bool:
    """Whether a series of an answer has any sample but NaN, such as 0/0."""
    samples = series["values"] if "values" in series else [series["value"]]
    return any(value != "NaN" for _, value in samples)


def local_configuration(members: tuple[Member, ...]) -> dict[str, Any]:
    """The configuration of docker compose, with a local network's ports and a faster pace."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / Path(name).name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job.pop("relabel_configs", None)
        mine = [member.address("metrics") for member in members if member.service.value == job["job_name"]]
        job["static_configs"] = [{"targets": mine}]
    return config


@contextmanager
def prometheus(folder: Path, members: tuple[Member, ...], port: int) -> Iterator[Prometheus]:
    """Scrape a local network inside the block."""
    assert PROMETHEUS is not None
    (folder / "prometheus.yml").write_text(yaml.safe_dump(local_configuration(members)))
    command = [PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        until(lambda: _is_ready(server, process), timeout_s=30)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(server: Prometheus, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus ended; see prometheus.log"
    try:
        return httpx.get(f"{server.url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
