"""Areas of the system, and where their tests are: `pytest tests/test_network.py` runs those of an area."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
AREAS: dict[str, tuple[str, ...]] = {
    "network": (
        "unit/discovery",
        "unit/gateway",
        "unit/network",
        "unit/platform",
        "integration/discovery",
        "integration/gateway",
        "integration/platform",
        "integration/websocket",
    ),
    "training": (
        "unit/data",
        "unit/dataplane",
        "unit/manager",
        "unit/model",
        "unit/worker",
        "integration/aggregator",
        "integration/manager",
        "integration/memory",
        "integration/worker",
        "simulation/test_convergence.py",
        "e2e/test_manager.py",
    ),
    "coordination": (
        "unit/coordinator",
        "unit/job",
        "integration/coordinator",
        "integration/stores",
        "simulation/test_job_machine.py",
        "e2e/test_regions.py",
    ),
    "security": (
        "unit/security",
        "integration/security",
        "fuzz",
        "tampering",
        "e2e/test_canaries.py",
        "e2e/test_revocation.py",
        "e2e/test_rotation.py",
    ),
}
ACROSS = (
    "architecture",
    "unit/benchmarks",
    "unit/cli",
    "unit/deploy",
    "unit/names",
    "integration/names",
    "e2e/test_demo.py",
    "e2e/test_local_network.py",
    "e2e/test_monitoring.py",
)
"""Tests of no area: of the commands, of the whole, and of how it is built and shipped."""


def entry(area: str) -> Path:
    """The file that stands for an area on a command line; it holds no tests."""
    return TESTS / f"test_{area}.py"


def expanded(arguments: Sequence[str], folder: Path) -> list[str]:
    """What pytest is to run, with the tests of an area in the place of its file.

    Args:
        arguments: As on the command line.
        folder: What relative ones start from.
    """
    entries = {entry(area): paths for area, paths in AREAS.items()}
    run: list[str] = []
    for argument in arguments:
        paths = entries.get((folder / argument).resolve())
        run += [argument] if paths is None else [str(TESTS / path) for path in paths]
    return run
