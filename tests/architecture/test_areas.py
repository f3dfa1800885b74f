"""`pytest tests/test_network.py` and its like run what they say, and nothing is left out unnoticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.areas import ACROSS, AREAS, TESTS, entry, expanded


def test_every_test_file_is_in_one_area_or_in_none_on_purpose() -> None:
    named = [TESTS / path for path in (*ACROSS, *(path for paths in AREAS.values() for path in paths))]
    entries = {entry(area) for area in AREAS}
    for file in {*TESTS.rglob("test_*.py")} - entries:
        assert sum(file.is_relative_to(path) for path in named) == 1, f"{file}: its place is in tests/areas.py"
    assert all(path.exists() for path in named)
    assert all("def test_" not in path.read_text() for path in entries)


def test_an_area_stands_for_its_folders_however_it_is_named(tmp_path: Path) -> None:
    files = [str(TESTS / path) for path in AREAS["network"]]
    assert expanded(["tests/test_network.py"], TESTS.parent) == files
    assert expanded([str(entry("network")), "tests/e2e"], tmp_path) == [*files, "tests/e2e"]
    assert expanded(["test_network.py"], tmp_path) == ["test_network.py"]


def test_the_file_of_an_area_runs_its_tests_and_each_once() -> None:
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_coordination.py", "tests/unit/job")
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout.split()
    files = [Path(word.removesuffix(":")) for word in found if word.startswith("tests/")]
    assert len(files) == len(set(files))
    for path in AREAS["coordination"]:
        assert any(file.is_relative_to(Path("tests", path)) for file in files), path
