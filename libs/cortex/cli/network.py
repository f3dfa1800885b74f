"""Commands about the nodes of the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortex.cli.common import DirOption, JsonOption, console, example, open_client, print_json, say

if TYPE_CHECKING:
    from cortex.views import NodeView

LIVE = "live"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=example("cortex nodes", "cortex nodes --role worker --json"))(nodes)
    app.command(epilog=example("cortex resources", "cortex resources --json"))(resources)


def nodes(
    role: Annotated[str | None, typer.Option(help="Only this role, e.g. worker.", show_default=False)] = None,
    region: Annotated[str | None, typer.Option(help="Only this region.", show_default=False)] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the nodes: health, region, load, what each is doing."""
    with open_client(directory) as client:
        found = [node for node in client.nodes() if role in (None, node.role) and region in (None, node.region)]
    if as_json:
        print_json(found)
    elif found:
        from cortex.cli.tables import nodes_table

        console().print(nodes_table(found))
    else:
        say("no such node is known to discovery")


def resources(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Show what the live workers of each region have, and what is free."""
    with open_client(directory) as client:
        found = client.nodes()
    regions = {region: totals(found, region) for region in sorted({node.region for node in found})}
    document = {"regions": regions, "total": totals(found, None)}
    if as_json:
        print_json(document)
        return
    from cortex.cli.tables import size, table

    shown = table("region", "workers", "free places", "cpu cores", "cpu in use", "memory free", "gpus", "datasets")
    for name, total in {**regions, "all": document["total"]}.items():
        shown.add_row(
            name,
            str(total["workers"]),
            f"{total['free_slots']} of {total['slots']}",
            str(total["cpu_cores"]),
            f"{total['cpu_utilisation'] * 100:.0f} %",
            f"{size(total['memory_available_bytes'])} of {size(total['memory_bytes'])}",
            str(total["gpus"]),
            ", ".join(total["datasets"]) or "-",
        )
    console().print(shown)


def totals(nodes: Sequence[NodeView], region: str | None) -> dict[str, Any]:
    """Sums over the live workers of a region, or of all; a mean for `cpu_utilisation`."""
    workers = [n for n in nodes if n.role == "worker" and n.health == LIVE and region in (None, n.region)]
    owned = [worker.resources for worker in workers]
    return {
        "workers": len(workers),
        "slots": sum(r.slots for r in owned),
        "free_slots": sum(r.free_slots for r in owned),
        "cpu_cores": sum(r.cpu_cores for r in owned),
        "cpu_utilisation": sum(r.cpu_utilisation for r in owned) / len(owned) if owned else 0.0,
        "memory_bytes": sum(r.memory_bytes for r in owned),
        "memory_available_bytes": sum(r.memory_available_bytes for r in owned),
        "gpus": sum(len(r.gpus) for r in owned),
        "gpu_memory_bytes": sum(gpu.memory_bytes for r in owned for gpu in r.gpus),
        "datasets": sorted({dataset.name for worker in workers for dataset in worker.datasets}),
    }
