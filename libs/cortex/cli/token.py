"""Commands about API tokens of a local network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.common import JsonOption, console, example, print_json, say
from cortex.cli.durations import parse_life
from cortex.cli.local import HereOption, layout_of

if TYPE_CHECKING:
    from pathlib import Path

    from cortex_common.security.tokens import TokenStore

app = typer.Typer(no_args_is_help=True, help="Bearer tokens of the HTTP API of a network on this machine.")


def store_of(directory: Path | None) -> TokenStore:
    """The tokens of the network in a directory."""
    from cortex.local.network import read_network
    from cortex_common.security.tokens import TokenStore

    layout = layout_of(directory)
    read_network(layout)
    return TokenStore(layout.tokens_file)


@app.command(
    epilog=example(
        "cortex token create ci --scope read --scope submit --life 30d", "cortex token create me --scope admin"
    )
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, submit or admin; may be repeated. read by default.", show_default=False),
    ] = None,
    life: Annotated[
        str | None,
        typer.Option(help="How long it is valid, e.g. 12h or 30d; until revoked by default.", show_default=False),
    ] = None,
    org: Annotated[
        str, typer.Option(help="Organisation whose jobs it may see; with the scope admin those of all.")
    ] = "default",
    directory: HereOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token. It is shown once: only a hash of it is stored."""
    span = None if life is None else parse_life(life)
    token = store_of(directory).create(name, scope or ["read"], span, org)
    if as_json:
        print_json({"id": token.split("_")[1], "name": name, "org": org, "scopes": scope or ["read"], "token": token})
    else:
        typer.echo(token)


@app.command("list", epilog=example("cortex token list", "cortex token list --json"))
def list_tokens(directory: HereOption = None, as_json: JsonOption = False) -> None:
    """List tokens: id, name, scopes, when they expire and were last used. Never the tokens themselves."""
    store = store_of(directory)
    used = {token_id: at.isoformat() for token_id, at in store.last_used().items()}
    records = [
        {**record.model_dump(mode="json", exclude={"hash"}), "last_used_at": used.get(record.id)}
        for record in store.list()
    ]
    if as_json:
        print_json(records)
        return
    from cortex.cli.tables import table

    shown = table("id", "name", "org", "scopes", "created", "expires", "last used")
    for record in records:
        shown.add_row(
            record["id"],
            record["name"],
            record["org"],
            ", ".join(record["scopes"]),
            record["created_at"],
            record["expires_at"] or "never",
            record["last_used_at"] or "not yet",
        )
    console().print(shown)


@app.command(epilog=example("cortex token revoke 3f2a9c41d0b7"))
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="From `cortex token list`.")],
    directory: HereOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token worthless at once."""
    store_of(directory).revoke(token_id)
    if as_json:
        print_json({"id": token_id, "revoked": True})
    else:
        say(f"revoked {token_id}")
