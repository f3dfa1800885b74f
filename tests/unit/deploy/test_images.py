"""What `make images` builds under which name, told by a program in Docker's place."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

from tests.monitoring import DEPLOY

DOCKER = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
*'{{.Size}}'*) echo 400000000 ;;
esac
"""


def images(folder: Path, *services: str, **environment: str) -> list[str]:
    """What was asked of Docker."""
    calls, docker = folder / "calls", folder / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(
        [DEPLOY / "images", *services], check=True, stdout=subprocess.PIPE,
        env={"PATH": path, "CALLS": str(calls), **environment},
    )  # fmt: skip
    return calls.read_text().splitlines()


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
