"""Virtual environments of the systems compared with, made once and kept in the user's cache directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.network import BenchmarkError

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {"flower": ("flwr",), "nvflare": ("nvflare",)}
"""By name of the system; the newest that can be had, beside the PyTorch that Cortex is measured with."""
_VERSIONS = "import sys, importlib.metadata as m; print(*(m.version(name) for name in sys.argv[1:]))"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a system is installed, and its packages' versions."""

    directory: Path
    versions: Mapping[str, str]

    def program(self, name: str) -> str:
        """Path of one of its commands."""
        return str(self.directory / "bin" / name)

    @property
    def python(self) -> str:
        """Its interpreter."""
        return self.program("python")

    def variables(self) -> dict[str, str]:
        """This process's variables, so that its commands come first and see nothing of Cortex's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEX_", "PYTHON"))}
        return kept | {
            "PATH": f"{self.directory / 'bin'}{os.pathsep}{kept.get('PATH', os.defpath)}",
            "VIRTUAL_ENV": str(self.directory),
            "OMP_NUM_THREADS": "1",
        }


def environment_of(system: str, upgrade: bool = False) -> Environment:
    """The environment of a system, installed if it isn't there.

    Args:
        system: One of REQUIREMENTS.
        upgrade: Look for newer versions.

    Raises:
        BenchmarkError: it cannot be installed; says what pip said.
    """
    directory = _cache() / system
    packages = (*REQUIREMENTS[system], f"torch=={version('torch').partition('+')[0]}")
    python = str(directory / "bin" / "python")
    if not Path(python).exists():
        _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    names = [package.partition("==")[0] for package in packages]
    found = subprocess.run([python, "-c", _VERSIONS, *names], capture_output=True, text=True)
    if found.returncode or upgrade:
        options = ["--upgrade"] if upgrade else []
        _run([python, "-m", "pip", "install", "--quiet", *options, packages[-1]])
        _run([python, "-m", "pip", "install", "--quiet", *options, *packages])
        found = subprocess.run([python, "-c", _VERSIONS, *names], capture_output=True, text=True, check=True)
    return Environment(directory, dict(zip(names, found.stdout.split(), strict=True)))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cortex" / "benchmarks"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[:4])} … failed: {done.stderr.strip()[-1500:]}")
