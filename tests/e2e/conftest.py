"""A whole network of real processes, started by `cortex up --detach`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from cortex.local.detached import stop_network
from cortex.local.layout import Layout
from cortex.local.network import read_network
from cortex.local.status import running_report
from cortex_common.identity import Role
from tests.waiting import until

# 24,010 numbers instead of 2,410: 0.77 s at a megabit a second.
WIDE = MappingProxyType({"hidden_dims: [32]": "hidden_dims: [320]"})
JOB = """
name: tiny
model: {{kind: mlp, input_dim: 64, hidden_dims: [32], output_dim: 10}}
data: {{train: digits, test: digits-test}}
training: {{learning_rate: 0.01, rounds: {rounds}, local_epochs: 1, seed: 3}}
placement: {{workers: 2, min_workers: 2}}
"""


@dataclass
class Shell:
    """A person with a terminal in a folder of their own; `variables` are exported there."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.folder / ".cortex")

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")}
        roots = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        return kept | {"PYTHONPATH": roots, "XDG_CACHE_HOME": str(self.folder / "cache")} | self.variables

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cortex", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str) -> Any:
        """What a command prints last on its standard output."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def job(self, rounds: int, replaced: Mapping[str, str] = MappingProxyType({})) -> str:
        """Write a job file, with some of its text replaced; its path."""
        text = JOB.format(rounds=rounds)
        for old, new in replaced.items():
            text = text.replace(old, new)
        path = self.folder / "job.yaml"
        path.write_text(text)
        return str(path)

    def processes(self) -> dict[str, int]:
        """Process ids of the running network, by name of a member."""
        report = running_report(self.layout)
        assert report is not None
        return {entry.name: entry.process.pid for entry in report.processes if entry.process}

    def slow_down(self, coordinator: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Let updates leave no faster than a megabit a second, so that jobs take their time and streams are open."""
        workers = [member.name for member in read_network(self.layout).of_role(Role.WORKER)]
        changes: dict[str, Mapping[str, Any]] = {name: {"bandwidth": {"up": "1Mbit/s"}} for name in workers}
        self.reconfigure(changes | ({"coordinator": coordinator} if coordinator else {}))

    def reconfigure(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Start members of the running network again with changed settings."""
        before = self.processes()
        for name, changed in changes.items():
            path = self.layout.config(name)
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | dict(changed)))
            os.kill(before[name], signal.SIGKILL)
        until(lambda: all(self.processes().get(name, before[name]) != before[name] for name in changes), 60)
        until(lambda: all(row["health"] == "healthy" for row in self.json("ps")), 60)
        workers = len(read_network(self.layout).of_role(Role.WORKER))
        until(lambda: self.json("resources")["total"]["workers"] == workers, 60)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A running network of two workers in two regions."""
    shell = Shell(tmp_path_factory.mktemp("network"))
    done = shell.run("up", "--detach", "--workers", "2")
    try:
        assert done.returncode == 0, done.stderr
        yield shell
    finally:
        stop_network(shell.layout)
