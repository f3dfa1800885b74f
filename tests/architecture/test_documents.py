"""What people read must be true: links lead somewhere, commands and metrics exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from cortex.cli.main import app
from cortex_common.settings import ServiceSettings
from services.aggregator.settings import AggregatorSettings
from services.coordinator.settings import CoordinatorSettings
from services.discovery.settings import DiscoverySettings
from services.gateway.settings import GatewaySettings
from services.worker.settings import WorkerSettings
from tests.architecture.sources import ROOT, sources

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SETTINGS = {
    "coordinator": CoordinatorSettings,
    "aggregator": AggregatorSettings,
    "worker": WorkerSettings,
    "discovery": DiscoverySettings,
    "gateway": GatewaySettings,
}
METRIC = re.compile(r"cortex_(?:aggregator|build|certificate|coordinator|discovery|gateway|node|rpc|worker)_[a-z_]+")


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = document.parent / name if name else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in re.findall(r"(?:^|`)cortex ([a-z]+)", document.read_text(), re.MULTILINE):
        assert command in commands, f"cortex {command}"


def test_the_operations_guide_names_every_setting() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    section = text.partition("\n## 3. Settings\n")[2].partition("\n## ")[0]
    common, table = section.split("\n| service | settings |", 1)
    assert set(ServiceSettings.model_fields) <= quoted(common)
    for service, settings in SETTINGS.items():
        (row,) = re.findall(rf"^\| {service} \|.*", table, re.MULTILINE)
        own = settings.model_fields.keys() - ServiceSettings.model_fields.keys()
        assert own <= quoted(row) <= own | quoted(common) | {"port"}, service


def quoted(text: str) -> set[str]:
    """Words that stand in code marks."""
    return set(re.findall(r"`(\w+)`", text))


def test_every_metric_is_documented_and_no_other() -> None:
    documented = set(METRIC.findall((ROOT / "docs/operations.md").read_text()))
    made = {name for path in sources() for name in re.findall(rf'"({METRIC.pattern})"', (ROOT / path).read_text())}
    # Some kinds of metric add an ending by themselves.
    assert {bare(name) for name in documented} == {bare(name) for name in made} | {"cortex_build"}


def bare(name: str) -> str:
    """A metric's name without the ending its kind adds."""
    return re.sub(r"_(total|info)$", "", name)
