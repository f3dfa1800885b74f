"""`python -m cortex_common.network.reference`: the messages in docs/websocket.md, made from their classes."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from cortex_common.network import messages as m
from cortex_common.network.protocol import TenzroProtocol

BEGIN = "<!-- messages: made by `python -m cortex_common.network.reference` -->"
END = "<!-- end of messages -->"


def section() -> str:
    """Every message with its JSON Schema, then what several of them hold."""
    shared: dict[str, Any] = {}
    lines = []
    for name, kind in TenzroProtocol.types().items():
        schema = TenzroProtocol.schema(name)
        shared |= schema.pop("$defs", {})
        sender = "node" if kind in get_args(m.FromNode) else "gateway"
        about = schema.pop("description").partition(": ")[2]
        lines += [f"### {name}", "", f"From the {sender}. {about[:1].upper()}{about[1:]}", "", *_attributes(kind)]
        lines += ["```json", *_told(schema), "```", ""]
    lines += ["### Shared definitions", "", "What `#/$defs/…` in the schemas above refers to.", "", "```json", "{"]
    parts = [f'"{name}": ' + "\n".join(_told(shared[name])) for name in sorted(shared)]
    return "\n".join([*lines, ",\n".join(parts), "}", "```"])


def with_section(document: str) -> str:
    """The document with its messages made anew."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}"


def _attributes(kind: type[m.Message]) -> list[str]:
    """What a class says of its fields, a line each."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    items = [" ".join(item.split()) for item in re.split(r"\n    (?=\w+: )", "\n" + text) if item.strip()]
    return [*(re.sub(r"^(\w+): ", r"- `\1`: ", item) for item in items), ""] if items else []


def _told(schema: Mapping[str, Any]) -> Iterator[str]:
    """A schema as JSON, a property a line."""
    rest = {key: value for key, value in schema.items() if key not in ("properties", "title")}
    head = ", ".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in rest.items())
    properties = {key: _untitled(value) for key, value in schema.get("properties", {}).items()}
    if not properties:
        yield f"{{{head}}}"
        return
    yield f'{{{head}, "properties": {{'
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in properties.items()]
    yield ",\n".join(lines)
    yield "}}"


def _untitled(schema: Any) -> Any:
    """Without the titles that only repeat names."""
    if isinstance(schema, Mapping):
        return {key: _untitled(value) for key, value in schema.items() if key != "title"}
    return [_untitled(each) for each in schema] if isinstance(schema, list) else schema


def main() -> int:
    """Rewrite the messages in the document named, or print them."""
    if len(sys.argv) < 2:
        sys.stdout.write(section() + "\n")
        return 0
    path = Path(sys.argv[1])
    path.write_text(with_section(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
