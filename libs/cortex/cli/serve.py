"""`cortex serve`: one service in the foreground; what containers and `cortex up` run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from cortex.cli.common import example
from cortex_common.errors import CortexError, InvalidArgumentError, NotFoundError
from cortex_common.rpc.tls13 import require_tls13

SERVICES = ("coordinator", "discovery", "aggregator", "worker", "gateway")


def run_service(service: str, config: Path | None) -> int:
    """Run a service until it is told to stop.

    Raises:
        InvalidArgumentError: no such service.
        NotFoundError: no such configuration file.
        PreconditionError: this process has imported gRPC already.
        CortexError: what this service needs is not installed.
    """
    if service not in SERVICES:
        raise InvalidArgumentError(f"service {service!r} given; allowed: {', '.join(SERVICES)}")
    if config is not None and not config.is_file():
        raise NotFoundError(f"configuration {config}: no such file")
    require_tls13()
    try:
        module = importlib.import_module(f"services.{service}.main")
    except ModuleNotFoundError as error:
        missing = error.name or "?"
        raise CortexError(
            f"the {service} service needs the Python module {missing!r}, which is not installed; "
            f"`pip install 'cortex-training[all]'` brings everything"
        ) from error
    return int(module.main(config))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=example(
            "cortex serve worker --config worker.yaml",
            "CORTEX_DISCOVERY=discovery:50052 cortex serve coordinator",
        )
    )(serve)


def serve(
    service: Annotated[str, typer.Argument(metavar="|".join(SERVICES), help="Which service.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Its settings, YAML.", show_default=False)
    ] = None,
) -> None:
    """Run one service in the foreground, until SIGTERM or Ctrl-C.

    Settings come from the file and from CORTEX_<SETTING> variables, which win.
    """
    raise typer.Exit(run_service(service, config))
