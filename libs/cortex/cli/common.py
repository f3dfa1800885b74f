"""What all commands share: options, output, and opening the network."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from cortex.client import Client

DirOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="Directory of a network started by `cortex up`. Without it: CORTEX_DIR, CORTEX_ENDPOINT, .cortex here, "
        "~/.config/cortex/config.toml.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, as printed by `cortex submit`.")]

PIPE_COLUMNS = 240


@contextlib.contextmanager
def open_client(directory: Path | None) -> Iterator[Client]:
    """A client of the network the person means; a certificate in the second half of its life is renewed first."""
    from cortex.client import Client
    from cortex.connection import find_connection
    from cortex.renewal import renew_if_due

    connection = find_connection(directory)
    renew_if_due(connection, say)
    with Client(connection) as client:
        yield client


def print_json(value: object) -> None:
    """One JSON value on one line of standard output."""
    sys.stdout.write(json.dumps(plain(value)) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> object:
    """A model, or a list of models, as JSON knows it."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def as_dict(model: BaseModel) -> Mapping[str, Any]:
    """The JSON object of a model."""
    return model.model_dump(mode="json")


def say(text: str) -> None:
    """A line for people on standard error: progress and notices, never results. Nobody reading it is no error."""
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def console(*, stderr: bool = False) -> Console:
    """A Rich console that leaves text alone: no emoji, no markup, no guesses about numbers; no folding in pipes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def example(*lines: str) -> str:
    """The end of a command's help: examples to copy."""
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)
