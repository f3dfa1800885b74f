"""Signing jobs, so that sites can tell whose they are."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.common import JsonOption, example, print_json, say
from cortex.cli.durations import parse_life
from cortex_common.errors import AlreadyExistsError, InvalidArgumentError

if TYPE_CHECKING:
    from cortex_common.envelope import Envelope
    from cortex_common.job.spec import JobSpec

KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="Sign with the key in this file.", show_default=False)
]
OrganisationOption = Annotated[
    str | None, typer.Option("--org", help="Organisation the job is signed for.", show_default=False)
]
LifeOption = Annotated[
    str, typer.Option("--life", metavar="DURATION", help="Sites refuse the job after this long: 12h, 7d …")
]
NetworkOption = Annotated[
    str | None, typer.Option("--network", help="The only network the job is for; any by default.", show_default=False)
]
DEFAULT_LIFE = "30d"


def register(app: typer.Typer) -> None:
    """Add the command."""
    lines = (
        "cortex sign --new-key ~/alice.key",
        "cortex sign job.yaml --key ~/alice.key --org hospital-a",
        "cortex sign job.signed.json --key ~/bob.key",
    )
    app.command(epilog=example(*lines))(sign)


def sign(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="JOB", help="A job file, or a signed one to add a signature to.", show_default=False),
    ] = None,
    key: KeyOption = None,
    organisation: OrganisationOption = None,
    life: LifeOption = DEFAULT_LIFE,
    network: NetworkOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="By default JOB with .signed.json at its end."),
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="FILE", help="Make a key, in a file that only you can read; then end."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a job, or make a key to sign with. Sites list the public keys they trust in their site policy."""
    if new_key is not None:
        return _make_key(new_key, file, as_json)
    if file is None or key is None:
        raise InvalidArgumentError("cortex sign: allowed is JOB with --key FILE, or --new-key FILE")
    from cortex_common.job.statement import load_submission

    signed = signed_job(load_submission(file), key, organisation, life, network)
    path = output or file.with_name(file.name.split(".")[0] + ".signed.json")
    if path.exists() and path != file and output is None:
        raise AlreadyExistsError(f"{path} exists; --output says where to write")
    path.write_text(signed.to_json() + "\n", encoding="utf-8")
    if as_json:
        print_json({"file": str(path), "key_ids": [each.key_id for each in signed.signatures]})
    else:
        typer.echo(str(path))
    return None


def signed_job(
    job: JobSpec | Envelope, key_file: Path, organisation: str | None, life: str, network: str | None = None
) -> Envelope:
    """A job with one more signature.

    Raises:
        InvalidArgumentError: a new statement needs an organisation; one that is signed already keeps its own.
    """
    from cortex_common.clock import SystemClock
    from cortex_common.envelope import Envelope
    from cortex_common.job.statement import JobStatement
    from cortex_common.security.signing import SigningKey

    key = SigningKey.load(key_file)
    if isinstance(job, Envelope):
        if organisation is not None or network is not None:
            raise InvalidArgumentError("--org and --network: the job is signed already; allowed: a job file")
        return key.sign(job)
    if organisation is None:
        raise InvalidArgumentError("--org is missing: for which organisation is the job signed?")
    now = datetime.fromtimestamp(SystemClock().wall_s(), UTC)
    statement = JobStatement.of(job, organisation, now, parse_life(life), network)
    return key.sign(statement.to_envelope())


def _make_key(path: Path, file: Path | None, as_json: bool) -> None:
    from cortex_common.security.signing import SigningKey

    if file is not None:
        raise InvalidArgumentError(f"cortex sign: {file} and --new-key given; allowed: one of them")
    public = SigningKey.create(path).public
    if as_json:
        print_json({"file": str(path), "public_key": str(public), "key_id": public.key_id})
        return
    say(f"{path} holds the private key: keep it. Sites that shall trust it are given the public key:")
    typer.echo(str(public))
