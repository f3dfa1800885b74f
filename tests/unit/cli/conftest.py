"""Fixtures of the command line's tests: running `cortex` in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cortex.local.detached import stop_network
from cortex.local.layout import Layout
from tests.unit.cli.fake_services import install

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _no_other_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the person's own networks out of the tests."""
    for name in [name for name in os.environ if name.startswith("CORTEX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory with fake services; whatever network runs in it is stopped at the end."""
    yield install(tmp_path / "work")
    stop_network(Layout.of(tmp_path / "work" / ".cortex"))


@pytest.fixture
def cortex(folder: Path) -> Run:
    """Run the command there."""

    def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cortex", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)

    return run
