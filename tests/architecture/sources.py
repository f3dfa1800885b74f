"""The product's Python files, parsed once."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "libs/cortex_common/pb"


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Path from the root, to the syntax tree; without generated code."""
    files = [path for part in ("libs", "services") for path in sorted((ROOT / part).rglob("*.py"))]
    own = [path for path in files if not path.is_relative_to(GENERATED)]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in own}


def calls(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are called, as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and names imported from them, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
