"""`python -m cortex.integration.reference`: the table of settings in docs/manager.md, made from the classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cortex.integration.settings import ManagerSettings

BEGIN = "<!-- settings: made by `python -m cortex.integration.reference` -->"
END = "<!-- end of settings -->"


def table() -> str:
    """All settings, a line each."""
    lines = ["| key | default | allowed | what it does |", "|---|---|---|---|"]
    return "\n".join([*lines, *_rows(ManagerSettings, "")])


def with_table(document: str) -> str:
    """The document with its table made anew."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    # What settings become, not all the ways to write them.
    schema = section.model_json_schema(mode="serialization")["properties"]
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is None or type(None) in get_args(field.annotation):
            facts = (f"`{prefix}{name}`", _default(field), _allowed(field, schema[name]), field.description or "")
            yield "| " + " | ".join(fact.replace("|", "\\|") for fact in facts) + " |"
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    members = [field.annotation, *get_args(field.annotation)]
    return next((each for each in members if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(field.default, default=str)}`"


def _allowed(field: FieldInfo, schema: dict[str, Any]) -> str:
    if _section_of(field) is not None:
        return "a mapping, or null"
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    told = " or ".join(dict.fromkeys(_told(each) for each in options))
    return f"{told}, or null" if len(options) < len(schema.get("anyOf", [schema])) else told


def _told(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    kind = {"integer": "whole number", "number": "number", "boolean": "true or false", "array": "list"}
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    above = "above" if "exclusiveMinimum" in schema else "from"
    limits = [f"{above} {low}"] if low is not None else []
    limits += [f"to {high}"] if high is not None else []
    limits += [f"below {schema['exclusiveMaximum']}"] if "exclusiveMaximum" in schema else []
    name = kind.get(str(schema.get("type")), "path" if schema.get("format") == "path" else "text")
    name = "mapping" if schema.get("type") == "object" else name
    return " ".join([name, *limits])


def main() -> int:
    """Rewrite the table in the document named, or print it."""
    if len(sys.argv) < 2:
        sys.stdout.write(table() + "\n")
        return 0
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
