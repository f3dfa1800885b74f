"""The `cortex` command: registers every command, turns errors into one message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from cortex.cli import audit, data, demo, jobs, keys, local, model, network, node, sealing, serve, sign, token
from cortex_common.errors import CortexError

app = typer.Typer(
    name="cortex",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distributed neural-network training across sites and regions.",
    epilog="Start here: `cortex demo`, or `cortex up` and then `cortex submit JOB.yaml --wait` in another terminal.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from cortex import __version__

        typer.echo(f"cortex {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    """Distributed neural-network training across sites and regions."""


for part in (local, demo, jobs, sign, network, serve):
    part.register(app)
sealing.register(data.app)
app.add_typer(model.app, name="model")
app.add_typer(data.app, name="data")
app.add_typer(token.app, name="token")
app.add_typer(node.app, name="node")
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 1 on failure, 2 on wrong usage, 130 when interrupted.
    """
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="cortex")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except CortexError as error:
        return _fail(error.message)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    prefix = "\033[31merror:\033[0m" if sys.stderr.isatty() else "error:"
    sys.stderr.write(f"{prefix} {message}\n")
    return 1
