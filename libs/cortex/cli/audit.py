"""Commands about the audit logs: who did what, who was refused, and whether the logs are as they were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cortex.cli.common import JsonOption, console, example, print_json
from cortex.cli.local import HereOption, layout_of
from cortex_common.errors import CorruptError, NotFoundError

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
    from cortex_common.security.audit import read_log

    records = [
        {"service": name, **record}
        for name, folder in _logs(log, directory)
        for record in read_log(folder)
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


@app.command(epilog=example("cortex audit verify", "cortex audit verify --log /srv/cortex/coordinator/audit"))
def verify(log: LogOption = None, directory: HereOption = None, as_json: JsonOption = False) -> None:
    """Check that no record was changed, removed or added since it was written, against the signed heads."""
    from cortex_common.security.audit import check_log
    from cortex_common.security.signed_heads import HEADS_FILE, read_heads, verified_head

    found: dict[str, dict[str, Any]] = {}
    for name, folder in _logs(log, directory):
        problems: list[str] = []
        known: dict[int, str] = {}
        try:
            heads = [verified_head(each)[1] for each in read_heads(folder / HEADS_FILE)]
            known = {head.number: head.hash for head in heads}
        except CorruptError as error:
            problems.append(error.message)
        checked = check_log(folder, known)
        known = {number: hashed for number, hashed in known.items() if number >= checked.first}
        found[name] = {
            "first": checked.first,
            "last": checked.last,
            "signed_heads": len(known),
            "problems": [*problems, *checked.problems],
        }
    if as_json:
        print_json(found)
    else:
        for name, result in found.items():
            range_of = f"records {result['first']} to {result['last']}" if result["last"] else "no records"
            typer.echo(
                f"{name}: {range_of}, {result['signed_heads']} signed heads: {'; '.join(result['problems']) or 'whole'}"
            )
    if any(result["problems"] for result in found.values()):
        raise typer.Exit(1)


def _logs(given: list[Path] | None, directory: Path | None) -> Iterator[tuple[str, Path]]:
    """Name and folder of each log that is meant."""
    if given:
        missing = [str(path) for path in given if not path.is_dir()]
        if missing:
            raise NotFoundError(f"no audit log at {', '.join(missing)}")
        yield from ((path.parent.name, path) for path in given)
        return
    from cortex.local.network import read_network

    layout = layout_of(directory)
    from cortex_common.security.tokens import TokenStore

    if (tokens := TokenStore(layout.tokens_file).audit_directory).is_dir():
        yield "tokens", tokens
    for member in read_network(layout).members:
        folder = layout.state(member.name) / "audit"
        if folder.is_dir():
            yield member.name, folder


def _shown(record: Mapping[str, Any], column: str) -> str:
    text = str(record.get(column, ""))
    if column == "what":
        return text.rpartition(".")[2]
    return text.removeprefix("spiffe://") if column == "who" else text
