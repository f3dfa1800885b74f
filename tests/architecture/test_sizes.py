"""The aims for sizes: held over all files, and the biggest ones are shown by `pytest -rA tests/architecture`."""

from __future__ import annotations

import ast
import statistics

from tests.architecture.sources import ROOT, sources

MIGRATIONS = "services/coordinator/migrations/"


def percentile(values: list[int], share: float) -> int:
    """The value below which this share of them lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def biggest(sizes: dict[str, int], count: int = 8) -> str:
    """The biggest ones, a line each."""
    return "\n".join(f"{size:5} {name}" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:count])


def lines(text: str) -> int:
    """How many there are; what a docstring shows as an example is not counted."""
    count, is_example = 0, False
    for line in text.splitlines():
        stripped = line.strip()
        is_example = stripped.startswith(">>> ") or (is_example and stripped not in ("", '"""'))
        count += not is_example
    return count


def test_files_are_short() -> None:
    sizes = {path: lines((ROOT / path).read_text()) for path in sources()}
    print(biggest(sizes))
    assert statistics.median(sizes.values()) <= 120
    assert percentile(list(sizes.values()), 0.95) <= 300, biggest(sizes)
    assert max(sizes.values()) <= 450, biggest(sizes)


def test_functions_are_short() -> None:
    sizes = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, tree in sources().items()
        if not path.startswith(MIGRATIONS)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    print(biggest(sizes))
    assert percentile(list(sizes.values()), 0.95) <= 30, biggest(sizes)
    assert max(sizes.values()) <= 80, biggest(sizes)
