"""What the kustomize overlays of deploy/k8s make."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import yaml

from tests.monitoring import DEPLOY
from tests.programs import KUBECTL


@cache
def objects(overlay: str) -> list[dict[str, Any]]:
    """Everything that is applied."""
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(DEPLOY / "k8s" / "overlays" / overlay)],
        check=True, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def templates(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of their workload."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in objects(overlay)
        if each["kind"] in ("Deployment", "StatefulSet")
    }


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Specs of pods by the name of their workload."""
    return {name: template["spec"] for name, template in templates(overlay).items()}
