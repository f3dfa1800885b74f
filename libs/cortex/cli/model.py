"""Commands about trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.common import DirOption, JobArgument, JsonOption, console, example, open_client, print_json, say

if TYPE_CHECKING:
    from cortex.views import VersionView

app = typer.Typer(no_args_is_help=True, help="List and download trained models.")

RoundOption = Annotated[
    int | None,
    typer.Option("--round", "-r", min=0, help="Version after this round; the newest by default.", show_default=False),
]


@app.command("list", epilog=example("cortex model list JOB", "cortex model list JOB --json"))
def list_versions(job_id: JobArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """List the stored versions of a job's model."""
    with open_client(directory) as client:
        versions = client.versions(job_id)
    if as_json:
        print_json(versions)
    elif versions:
        _print_versions(versions)
    else:
        say(f"job {job_id} has no model yet")


def _print_versions(versions: list[VersionView]) -> None:
    from cortex.cli.tables import number, size, table

    shown = table(
        "round", "accuracy", "test loss", "parameters", "size", "created", "sha256", right=("round", "parameters")
    )
    for version in versions:
        shown.add_row(
            str(version.round),
            number(version.metrics.get("test_accuracy")),
            number(version.metrics.get("test_loss")),
            f"{version.parameters:,}",
            size(version.size_bytes),
            f"{version.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
            version.sha256,
        )
    console().print(shown, soft_wrap=True)


@app.command(epilog=example("cortex model download JOB -o model.safetensors", "cortex model download JOB --round 3"))
def download(
    job_id: JobArgument,
    round_number: RoundOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File or folder to write to.", show_default=False),
    ] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model as a safetensors file; its digest is checked."""
    name = f"{job_id}.safetensors" if round_number is None else f"{job_id}-round-{round_number}.safetensors"
    path = Path(name) if output is None else output / name if output.is_dir() else output
    with open_client(directory) as client:
        version = client.download_model(job_id, round_number, path)
    if as_json:
        print_json({"path": str(path), **version.model_dump(mode="json")})
    else:
        typer.echo(f"{path}  (round {version.round}, {version.size_bytes:,} bytes, sha256 {version.sha256})")
