"""Commands about who belongs to the network: letting nodes in, shutting them out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cortex.cli.common import DirOption, JsonOption, console, example, open_client, print_json, say
from cortex.cli.durations import parse_life
from cortex_common.errors import InvalidArgumentError, NotFoundError
from cortex_common.identity import Role

_JOIN_LIFE, _NODE_LIFE = "24h", "30d"

app = typer.Typer(no_args_is_help=True, help="Members of the network: let them in, list them, shut them out.")


@app.command(
    epilog=example(
        "cortex node token --role worker --name eu-7 --region eu",
        "cortex node token --role operator --name ann --life 1h > ann.join",
        "cortex node token --gateway --name lab-3 --region eu",
    )
)
def token(
    role: Annotated[Role, typer.Option(help="What the node will be.", case_sensitive=False)] = Role.WORKER,
    name: Annotated[
        str | None,
        typer.Option(help="Its name; the region and a number by default, for workers.", show_default=False),
    ] = None,
    region: Annotated[str, typer.Option(help="Where it is.")] = "local",
    life: Annotated[
        str | None,
        typer.Option(
            help="How long the token may be used, e.g. 1h or 7d; 24h by default, 30d with --gateway.",
            show_default=False,
        ),
    ] = None,
    gateway: Annotated[
        bool,
        typer.Option("--gateway", help="For a worker that only reaches the gateway, over WebSocket: no certificate."),
    ] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a join token: it lets one node in, once. Carry it there by a way you trust; it is shown this once.

    With --gateway, a node token instead: the worker proves itself with it whenever it connects, until it expires.
    """
    if gateway and role is not Role.WORKER:
        raise InvalidArgumentError(f"--gateway: a {role.value} needs a certificate; allowed is --role worker")
    span_s = parse_life(life or (_NODE_LIFE if gateway else _JOIN_LIFE)).total_seconds()
    with open_client(directory) as client:
        if name is None:
            name = _free_name(role, region, {each.name for each in client.identities().identities})
        if gateway:
            made, expires_at = client.node_token(name, region, span_s)
        else:
            made, expires_at = client.join_token(role, name, region, span_s)
    if as_json:
        print_json(
            {"token": made, "role": role.value, "name": name, "region": region, "expires_at": f"{expires_at:%FT%TZ}"}
        )
        return
    typer.echo(made)
    there = "set node_token and gateway_url" if gateway else "cortex node enroll TOKEN"
    say(f"lets {role.value} {name!r} in until {expires_at:%F %T} UTC; there: {there}")


@app.command(
    epilog=example(
        "cortex node enroll ctxjoin_…",
        "cortex node enroll @eu-7.join --out /etc/cortex/tls --host eu-7.example.org",
    )
)
def enroll(
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="From `cortex node token`; @FILE reads it from a file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where key and certificate go; ./cortex-NAME by default.", show_default=False),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address under which others reach this node's server.", show_default=False),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where to enrol, if not where the token says.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Join a network: make a key here, and get a certificate for it. The key never leaves this machine."""
    import asyncio

    from cortex_common.identity import TlsFiles
    from cortex_common.network.enrolment import enroll as join
    from cortex_common.security.certificates import certificate_of
    from cortex_common.security.joining import JoinToken

    joining = JoinToken.decode(_text_of(token))
    folder = (out or Path(f"cortex-{joining.identity.name}")).absolute()
    tls = TlsFiles(folder / "ca.pem", folder / "tls.crt", folder / "tls.key")
    asyncio.run(join(joining, tls, host or [], address=at))
    ends = certificate_of(tls).not_after
    if as_json:
        print_json(
            {
                "identity": joining.identity.uri,
                "region": joining.region,
                "ca": str(tls.ca),
                "certificate": str(tls.certificate),
                "key": str(tls.key),
                "expires_at": f"{ends:%FT%TZ}",
            }
        )
        return
    typer.echo(f"{joining.identity.uri} joined; it is in {folder}, until {ends:%F %T} UTC, renewed by whoever uses it")
    if joining.identity.role is Role.OPERATOR:
        typer.echo(f"export CORTEX_CA={tls.ca} CORTEX_CERTIFICATE={tls.certificate} CORTEX_KEY={tls.key}")


@app.command(epilog=example("cortex node revoke eu-7", "cortex node revoke eu-7 --reason 'laptop lost'"))
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="From `cortex node list`.")],
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log and in refusals.")] = "",
    role: Annotated[
        Role | None, typer.Option(help="Only of this role.", show_default=False, case_sensitive=False)
    ] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shut a node out, within seconds: its calls are refused, its streams cut, its unfinished work given to others.

    A new join token for the same name lets it in again.
    """
    with open_client(directory) as client:
        meant = client.revoke_node(name, reason, role)
    if as_json:
        print_json({"revoked": meant})
    else:
        for identity in meant:
            typer.echo(f"revoked {identity}")


@app.command("list", epilog=example("cortex node list", "cortex node list --json"))
def list_nodes(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """List who has certificates, who is shut out, and which join tokens are open."""
    with open_client(directory) as client:
        found = client.identities()
    if as_json:
        print_json(found)
        return
    from cortex.cli.tables import table

    shown = table("role", "name", "region", "standing", "until", "serial")
    for each in found.identities:
        standing = "member" if each.revoked_at is None else f"revoked {each.revoked_at:%F %T} {each.revoked_reason}"
        until = "-" if each.expires_at is None else f"{each.expires_at:%F %T}"
        shown.add_row(each.role, each.name, each.region or "-", standing.strip(), until, each.serial[:16] or "-")
    for token in found.tokens:
        role, name = token.identity.split("/")[-2:]
        until = "-" if token.expires_at is None else f"{token.expires_at:%F %T}"
        shown.add_row(role, name, token.region, f"may join with {token.token_id}", until, "-")
    console().print(shown)


@app.command(epilog=example("cortex node rotate", "cortex node rotate --root"))
def rotate(
    root: Annotated[bool, typer.Option("--root", help="A new root too, not only a new issuing authority.")] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make new authorities at once; they are made by themselves at half of their lives. Nobody is locked out by it."""
    with open_client(directory) as client:
        made = client.rotate_authority(root=root)
    if as_json:
        print_json({"made": made})
    else:
        typer.echo(f"made: {', '.join(made)}")


def _free_name(role: Role, region: str, taken: set[str]) -> str:
    if role is not Role.WORKER:
        raise InvalidArgumentError(f"--name is missing; a {role.value} is known by its name")
    return next(name for number in range(1, len(taken) + 2) if (name := f"{region}-{number}") not in taken)


def _text_of(token: str) -> str:
    if not token.startswith("@"):
        return token
    try:
        return Path(token[1:]).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise NotFoundError(f"join token {token[1:]} cannot be read: {error.strerror or error}") from None
