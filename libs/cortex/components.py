"""`python -m cortex.components docs/components.md`: the table of parts in the document, made from their docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

from cortex.names import COMPONENTS, find

BEGIN = "<!-- components: made by `python -m cortex.components docs/components.md` -->"
END = "<!-- end of components -->"


def table() -> str:
    """The parts, a line each, with the first line of their docstrings."""
    lines = ["| layer | name | module | what it is |", "|---|---|---|---|"]
    for layer, names in COMPONENTS.items():
        for name, home in names.items():
            told = (find(name).__doc__ or "").strip().partition("\n")[0]
            lines.append(f"| {layer} | `{name}` | `{home}` | {told} |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """The document with its table made anew."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
