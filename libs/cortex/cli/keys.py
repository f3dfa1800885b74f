"""Commands about the keys that jobs are sealed under."""

from __future__ import annotations

from typing import Annotated

import typer

from cortex.cli.common import DirOption, JsonOption, console, example, open_client, print_json
from cortex_common.errors import InvalidArgumentError

app = typer.Typer(no_args_is_help=True, help="The keys that jobs are sealed under: list them, replace them.")


@app.command("list", epilog=example("cortex keys list", "cortex keys list 3f2a… --json"))
def list_keys(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="One job's; of all unfinished ones by default.")
    ] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List data keys: since which round, why, what they are good for, and which key-encryption key they rest under."""
    with open_client(directory) as client:
        found = client.keys(job or "")
    if as_json:
        print_json(found)
        return
    from cortex.cli.tables import table

    shown = table("job", "epoch", "state", "from round", "made", "because", "rests under")
    for each in found:
        made = "-" if each.created_at is None else f"{each.created_at:%F %T}"
        shown.add_row(
            each.job_id, str(each.epoch), each.state, str(each.from_round), made, each.reason or "-", each.kek_id
        )
    console().print(shown)


@app.command(
    epilog=example("cortex keys rotate 3f2a…", "cortex keys rotate 3f2a… --reseal", "cortex keys rotate --kek")
)
def rotate(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Whose data key.", show_default=False)] = None,
    kek: Annotated[bool, typer.Option("--kek", help="The key-encryption key, which all data keys rest under.")] = False,
    reseal: Annotated[
        bool, typer.Option("--reseal", help="Also seal what is stored of the job under its new data key.")
    ] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace a key, without disturbing a round, and without touching data unless --reseal is given.

    A job's next round begins with a new data key; the round in progress keeps its own. With --kek, every data key is
    wrapped under a new key-encryption key, and the old one is destroyed. With --reseal, versions, deltas and optimiser
    states of the job are opened and sealed again under its new key, and the older ones are erased.
    """
    if (job is None) != kek:
        raise InvalidArgumentError("which key? allowed: a JOB, for its data key, or --kek")
    if kek and reseal:
        raise InvalidArgumentError("--reseal goes with a JOB; allowed with --kek: nothing else")
    with open_client(directory) as client:
        if job is None:
            made, count = client.rotate_key_encryption_key()
            if as_json:
                print_json({"kek_id": made, "rewrapped": count})
            else:
                typer.echo(f"{made}: {count} data keys rest under it now")
            return
        count = client.rotate_data_key(job, reseal=reseal)
    if as_json:
        print_json({"job_id": job, "resealed": count})
    elif count:
        typer.echo(f"{job}: {count} versions are under a new data key now")
    else:
        typer.echo(f"{job}: a new data key from the next round on; see `cortex keys list {job}`")
