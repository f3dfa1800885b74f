"""Commands about a network of processes on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.common import JsonOption, console, example, print_json, say

if TYPE_CHECKING:
    from cortex.local.layout import Layout
    from cortex.local.network import LocalNetwork

INTERRUPTED = 130
HereOption = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="DIR", help="The network's directory; CORTEX_DIR or .cortex by default.", show_default=False
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", "-n", min=1, max=1000, help="How many workers; as last time, or 4.", show_default=False),
]
RegionsOption = Annotated[
    str | None,
    typer.Option(
        "--regions",
        metavar="A,B",
        help="An aggregator each; workers are dealt in turn. As last time, or eu,us.",
        show_default=False,
    ),
]
CatalogueOption = Annotated[
    Path | None,
    typer.Option(
        "--catalogue",
        metavar="FILE",
        help="The workers' own datasets: see examples/own-data.yaml; {name} is the worker's. As last time, or none.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=example("cortex up", "cortex up --workers 8 --regions eu,us,asia", "cortex up --detach"))(up)
    app.command(epilog=example("cortex down", "cortex down --dir /srv/cortex"))(down)
    app.command(epilog=example("cortex ps", "cortex ps --json"))(ps)


def layout_of(directory: Path | None) -> Layout:
    """The layout of the directory that is meant."""
    from cortex.local.layout import DEFAULT_DIR, Layout

    return Layout.of(directory or Path(os.environ.get("CORTEX_DIR") or DEFAULT_DIR))


def up(
    workers: WorkersOption = None,
    regions: RegionsOption = None,
    directory: HereOption = None,
    catalogue: CatalogueOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when every service is healthy; `cortex down` stops.")
    ] = False,
    parent_pid: Annotated[int | None, typer.Option(hidden=True)] = None,
    in_background: Annotated[bool, typer.Option(hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a whole network on this machine: all services as processes, with certificates, supervised.

    A process that dies is started again. Ctrl-C stops everything. The state stays in the directory: the next
    `cortex up` goes on from there, unfinished jobs included.
    """
    from cortex.local.detached import start_detached
    from cortex.local.network import changed, known_network, read_network
    from cortex.local.token import ensure_token

    layout = layout_of(directory)
    if not detach:
        named = None if regions is None else [region.strip() for region in regions.split(",")]
        wanted = changed(known_network(layout), workers, named, catalogue)
        # Who waits in the foreground announces: the token must not get into the supervisor's log.
        announced = None if in_background else as_json
        return _in_foreground(layout, wanted, parent_pid, announced)
    options = [] if workers is None else ["--workers", str(workers)]
    options += [] if regions is None else ["--regions", regions]
    options += [] if catalogue is None else ["--catalogue", str(catalogue)]
    start_detached(layout, options, say)
    _announce(layout, read_network(layout), ensure_token(layout), as_json, detached=True)
    return None


def _in_foreground(layout: Layout, network: LocalNetwork, parent_pid: int | None, announced: bool | None) -> None:
    """Supervise until stopped; `announced` is whether to announce in JSON, None for not at all."""
    import asyncio

    from cortex.local.ports import PortClaims, claims_folder
    from cortex.local.prepare import prepare
    from cortex.local.supervisor import exclusive, supervise
    from cortex.local.token import ensure_token
    from cortex_common.clock import SystemClock
    from cortex_common.lifecycle import end_with_parent

    if parent_pid is not None:
        end_with_parent(parent_pid)
    healthy = False

    def announce() -> None:
        nonlocal healthy
        healthy = True
        if announced is not None:
            _announce(layout, prepared.network, token, announced, detached=False)

    with exclusive(layout), PortClaims(claims_folder()) as ports:
        prepared = prepare(layout, network, ports.claim)
        token = ensure_token(layout)
        for notice in prepared.notices:
            say(notice)
        say(f"starting {len(prepared.network.members)} services in {layout.root}")
        asyncio.run(
            supervise(
                layout, prepared.network, SystemClock(), lambda member: say(f"  {member.name} is ready"), announce
            )
        )
    say("all services stopped")
    if not healthy:
        raise typer.Exit(INTERRUPTED)


def _announce(layout: Layout, network: LocalNetwork, token: str, as_json: bool, *, detached: bool) -> None:
    from cortex.local.describe import describe, facts_of

    if as_json:
        print_json(facts_of(layout, network, token))
    else:
        typer.echo(describe(layout, network, token, detached=detached))


def down(directory: HereOption = None, as_json: JsonOption = False) -> None:
    """Stop the network of a directory, and wait until every process is gone. The state stays."""
    from cortex.local.detached import stop_network
    from cortex.local.network import read_network

    layout = layout_of(directory)
    read_network(layout)
    stopped = stop_network(layout)
    if as_json:
        print_json({"dir": str(layout.root), "stopped": stopped})
    else:
        typer.echo(f"stopped the network in {layout.root}" if stopped else f"no network was running in {layout.root}")


def ps(directory: HereOption = None, as_json: JsonOption = False) -> None:
    """List the processes of a network, their health asked now."""
    from cortex.local.network import read_network
    from cortex.local.status import process_table, running_report

    layout = layout_of(directory)
    network = read_network(layout)
    report = running_report(layout)
    rows = process_table(layout, network.members, report)
    if as_json:
        print_json(rows)
        return
    from cortex.cli.tables import HEALTH_STYLES, table

    shown = table("service", "name", "pid", "health", "address", "metrics", "restarts", right=("pid", "restarts"))
    for row in rows:
        shown.add_row(
            *(row["service"], row["name"], str(row["pid"] or "-"), row["health"]),
            *(row["address"] or "-", row["addresses"]["metrics"], str(row["restarts"])),
            style=None if row["health"] == "healthy" else HEALTH_STYLES[row["health"]],
        )
    console().print(shown)
    for row in rows:
        if report is not None and row["reason"]:
            say(f"{row['name']}: {row['reason']}")
    if report is None:
        say(f"the network in {layout.root} is not running; `cortex up --dir {layout.root}` starts it")
