"""Commands about the audit logs: who did what, who was refused, and whether the logs are as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortex.cli.common import JsonOption, console, example, print_json
from cortex.cli.local import HereOption, layout_of

if TYPE_CHECKING:
    from cortex_common.security.audit_proof import Proof

app = typer.Typer(
    no_args_is_help=True, help="Audit logs of services and API tokens: privileged calls, changes, refusals."
)
LogOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--log",
        metavar="DIR",
        help="An audit log's folder; those of the network in --dir by default.",
        show_default=False,
    ),
]
_COLUMNS = ("at", "service", "decision", "code", "who", "what", "about", "reason", "repeats")


@app.command("list", epilog=example("cortex audit list", "cortex audit list --refused --last 20 --json"))
def list_records(
    log: LogOption = None,
    refused: Annotated[bool, typer.Option("--refused", help="Only refusals.")] = False,
    who: Annotated[
        str | None, typer.Option(help="Only callers whose identity contains this.", show_default=False)
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 100,
    directory: HereOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was recorded, oldest first."""
    from cortex.cli.audit_trust import asked_logs
    from cortex_common.security.audit import read_log

    records = [
        {"service": each.name, **record}
        for each in asked_logs(log, None, layout_of(directory))
        for record in read_log(each.folder)
        if (not refused or record.get("decision") == "refused") and (who is None or who in record.get("who", ""))
    ]
    records = sorted(records, key=lambda record: str(record["at"]))[-last:]
    if as_json:
        print_json(records)
        return
    from cortex.cli.tables import table

    shown = table(*_COLUMNS)
    for record in records:
        shown.add_row(*(_shown(record, column) for column in _COLUMNS))
    console().print(shown)


@app.command(
    epilog=example(
        "cortex audit verify",
        "cortex audit verify --log /srv/cortex/coordinator/audit --roots ca.pem "
        "--service spiffe://cortex/coordinator/coordinator --heads collected.jsonl",
    )
)
def verify(
    log: LogOption = None,
    heads: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Heads kept elsewhere: copies of heads.jsonl, or services' log lines audit_head (in JSON).",
            show_default=False,
        ),
    ] = None,
    roots: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Roots the network has had: PEM files, or discovery's authority folder. That of the network in --dir "
            "by default, or CORTEX_CA.",
            show_default=False,
        ),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(
            metavar="SPIFFE",
            help="Whose the one --log is. In the network of --dir that is known; else the check tells who signed.",
            show_default=False,
        ),
    ] = None,
    directory: HereOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no record was changed, removed or added since a head of it was signed, and by whom the heads are.

    What is not proven is said too: records since the last head, and what earlier versions did not write down.
    """
    from cortex.cli.audit_trust import asked_logs, prove_all, trust_of

    layout = layout_of(directory)
    logs = asked_logs(log, service, layout)
    found = prove_all(logs, trust_of(logs, roots, heads, layout))
    if as_json:
        print_json({each.name: _as_json(proof) for each, proof in found})
    else:
        for each, proof in found:
            typer.echo(f"{each.name}: {_summary(proof)}: {'; '.join(proof.problems) or 'whole'}")
            for sentence in proof.unproven:
                typer.echo(f"{each.name}: not proven: {sentence}")
    if any(proof.problems for _, proof in found):
        raise typer.Exit(1)


def _as_json(proof: Proof) -> dict[str, Any]:
    return {
        "first": proof.first,
        "last": proof.last,
        "signed_heads": proof.heads,
        "signed_up_to": proof.signed_up_to,
        "signed_by": proof.by,
        "problems": proof.problems,
        "unproven": proof.unproven,
    }


def _summary(proof: Proof) -> str:
    records = f"records {proof.first} to {proof.last}" if proof.last else "no records"
    heads = f"{proof.heads} signed head{'' if proof.heads == 1 else 's'}"
    return f"{records}, {heads}{f' by {proof.by}' if proof.by else ''}"


def _shown(record: Mapping[str, Any], column: str) -> str:
    text = str(record.get(column, ""))
    if column == "what":
        return text.rpartition(".")[2]
    return text.removeprefix("spiffe://") if column == "who" else text
