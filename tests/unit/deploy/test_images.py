"""What `make images` builds under which name, and what it refuses, told by a program in Docker's place."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring import DEPLOY

DOCKER = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
*python:3.11*'{{.Size}}'*) echo 240000000 ;;
*'{{.Size}}'*) echo "${IMAGE_SIZE:-489000000}" ;;
*'{{.Config.User}}'*) echo "${IMAGE_USER-10001:10001}" ;;
*'--entrypoint test'*) exit "${NO_BILL:-0}" ;;
*'--entrypoint python'*) exit "${HAS_TORCH:-0}" ;;
esac
"""


def run(folder: Path, *services: str, **environment: str) -> subprocess.CompletedProcess[str]:
    docker = folder / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    every = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), **environment}
    return subprocess.run([DEPLOY / "images", *services], check=False, text=True, capture_output=True, env=every)


def images(folder: Path, *services: str, **environment: str) -> list[str]:
    """What was asked of Docker."""
    done = run(folder, *services, **environment)
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().splitlines()


def tags(calls: list[str]) -> list[str]:
    return [found[1] for call in calls if (found := re.search(r"^build .*--tag (\S+)", call))]


def test_the_five_images_have_the_tags_that_compose_and_kubernetes_start(tmp_path: Path) -> None:
    names = ["coordinator", "discovery", "aggregator", "worker", "gateway"]
    assert tags(images(tmp_path)) == [f"cortex/{name}:0.1.0" for name in names]


def test_the_documented_command_makes_the_image_that_overlay_gpu_starts_and_leaves_the_other_alone(
    tmp_path: Path,
) -> None:
    overlay = yaml.safe_load((DEPLOY / "k8s" / "overlays" / "gpu" / "kustomization.yaml").read_text())
    (wanted,) = overlay["images"]
    documented = re.search(
        r"`TORCH_INDEX=(\S+) deploy/images worker`", (DEPLOY.parent / "docs" / "deployment.md").read_text()
    )
    assert documented is not None
    made = tags(images(tmp_path, "worker", TORCH_INDEX=documented[1]))
    assert made == [f"{wanted['name']}:{wanted['newTag']}"]


def test_a_suffix_can_be_given_and_is_the_workers_only(tmp_path: Path) -> None:
    made = tags(images(tmp_path, "gateway", "worker", TORCH_INDEX="", SUFFIX="-gpu", VERSION="7", REGISTRY="r/c"))
    assert made == ["r/c/gateway:7", "r/c/worker:7-gpu"]


WRONG = {
    "IMAGE_USER": ("", "does not run as user 10001"),
    "NO_BILL": ("1", "has no bill of materials"),
    "HAS_TORCH": ("1", "has PyTorch"),
    "IMAGE_SIZE": ("491000000", "is 251 MB larger than python:3.11-slim-bookworm; allowed: 250"),
}


@pytest.mark.parametrize("service", ["coordinator", "discovery", "gateway"])
@pytest.mark.parametrize("what", WRONG)
def test_an_image_that_is_not_as_it_should_be_ends_the_build(what: str, service: str, tmp_path: Path) -> None:
    value, told = WRONG[what]
    done = run(tmp_path, service, **{what: value})
    assert (done.returncode, done.stderr) == (1, f"error: cortex/{service}:0.1.0 {told}\n")


def test_images_that_train_or_fold_may_be_large_and_have_pytorch(tmp_path: Path) -> None:
    images(tmp_path, "worker", "aggregator", IMAGE_SIZE="1555000000", HAS_TORCH="1")
    assert run(tmp_path, "worker", NO_BILL="1").returncode == 1
