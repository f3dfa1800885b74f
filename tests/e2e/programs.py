"""Programs with CortexManager in processes of their own, and what can be seen of them from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.architecture.sources import ROOT
from tests.e2e.conftest import Shell

README = (ROOT / "README.md").read_text()
CONFIG = next(text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "websocket_url" in text)
SNIPPET = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "CortexManager" in text)
DATA = """
import asyncio, json, torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed({seed})
labels = torch.arange(640) % 10
width = {width}
inputs = torch.nn.functional.one_hot(labels, 10).float().repeat(1, 79)[:, :width] + 0.1 * torch.randn(640, width)
dataloader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)
"""
RUN = """
from cortex import CortexManager

manager = CortexManager("config.yaml")
job = manager.run(dataloader)
print(json.dumps({"model": type(manager.model).__mro__[1].__name__, "job": job.job_id,
                  "right": int((manager.model(inputs).argmax(1) == labels).sum()),
                  "accepted": [report.accepted for report in manager.history]}))
"""
NOTEBOOK = """
from cortex import CortexManager
from tests.doctests import run_examples

given = {"dataloader": dataloader, "inputs": inputs, "labels": labels}
print(asyncio.run(run_examples(CortexManager, given)))
"""
GATED = """
from pathlib import Path
from threading import Event
from torch.utils.data import RandomSampler


class Gated(RandomSampler):
    passes = 0

    def __iter__(self):
        self.passes += 1
        while self.passes > 3 and not Path("go").exists():
            Path("waits").touch()
            Event().wait(0.05)
        yield from super().__iter__()


dataset = TensorDataset(inputs, labels)
dataloader = DataLoader(dataset, batch_size=64, sampler=Gated(dataset))
"""


def websocket_address(network: Shell) -> str:
    members = json.loads(network.layout.network_file.read_text())["members"]
    port = next(member["ports"]["websocket"] for member in members if member["service"] == "gateway")
    return f"localhost:{port}"


class Program:
    """A program in a folder of its own, beside the README's config.yaml; variables change what differs."""

    def __init__(
        self, network: Shell, name: str, source: str, *, width: int = 784, seed: int = 0, **variables: Any
    ) -> None:
        self.folder = network.folder / name
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text(CONFIG)
        (self.folder / "program.py").write_text(DATA.format(width=width, seed=seed) + source)
        given = {
            "CORTEX_DIR": network.layout.root,
            "CORTEX_NETWORK__WEBSOCKET_URL": f"ws://{websocket_address(network)}",
            "CORTEX_TRAINING__MAX_EPOCHS": 3,
        } | variables
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "program.py"],
            cwd=self.folder,
            env=network.environment | {key: str(value) for key, value in given.items()},
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def end(self) -> tuple[str, str]:
        """What it printed, and its log, once it has ended well."""
        out, err = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, err
        return out, err


def listening(pid: int) -> list[int]:
    """The ports at which a process takes connections."""
    connections = psutil.Process(pid).net_connections("inet")
    return [each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN]


def scraped(port: int) -> dict[str, float]:
    """Metrics without labels, as Prometheus reads them."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).raise_for_status()
    families = text_string_to_metric_families(answer.text)
    return {each.name: each.value for family in families for each in family.samples if not each.labels}


def levels(log: str) -> set[str]:
    """Of the lines of a log."""
    return set(re.findall(r"^\S+Z \[(\w+) *\]", log, re.MULTILINE))


def event(log: str, name: str) -> str:
    """The one line of an event."""
    (line,) = [line for line in log.splitlines() if name in line]
    return line
