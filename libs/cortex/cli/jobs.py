"""Commands about jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cortex.cli.common import DirOption, JobArgument, JsonOption, console, example, open_client, print_json, say
from cortex.cli.interrupt import Interrupt
from cortex.cli.sign import DEFAULT_LIFE, KeyOption, LifeOption, OrganisationOption, signed_job

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cortex.client import Client
    from cortex_common.job.status import JobStatus

INTERRUPTED = 130
Item = TypeVar("Item")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=example("cortex submit examples/digits.yaml", "cortex submit job.yaml --wait --json | tail -1"))(
        submit
    )
    app.command(epilog=example("cortex jobs", "cortex jobs --limit 5 --json"))(jobs)
    app.command(epilog=example("cortex status JOB", "cortex status JOB --watch", "cortex status JOB --json"))(status)
    app.command(epilog=example("cortex logs JOB", "cortex logs JOB --follow"))(logs)
    app.command(epilog=example("cortex cancel JOB"))(cancel)
    app.command(epilog=example("cortex pause JOB"))(pause)
    app.command(epilog=example("cortex resume JOB"))(resume)


def submit(
    file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file, YAML or JSON; or a signed one.")],
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job until it ends; exit 1 if it failed.")] = False,
    key: KeyOption = None,
    organisation: OrganisationOption = None,
    life: LifeOption = DEFAULT_LIFE,
    request_id: Annotated[
        str | None,
        typer.Option(help="Your name for this submission: the same one again gives the same job.", show_default=False),
    ] = None,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a job file, submit it, print the job's id."""
    from cortex_common.job.statement import load_submission

    job = load_submission(file)
    if key is not None:
        job = signed_job(job, key, organisation, life)
    with Interrupt() as interrupt, open_client(directory) as client:
        job_id = client.submit(job, request_id)
        if wait:
            say(f"submitted {job_id}")
            _follow(client, job_id, as_json, interrupt)
        elif as_json:
            print_json({"job_id": job_id})
        else:
            typer.echo(job_id)


def _follow(client: Client, job_id: str, as_json: bool, interrupt: Interrupt) -> None:
    """Follow a job to its end, print how it ended."""
    from cortex.cli.live import follow, outcome

    screen = console(stderr=as_json)
    try:
        last = follow(client, job_id, screen, interrupt)
    except KeyboardInterrupt:
        say(
            f"\nstopped watching; the job goes on: `cortex status {job_id} --watch` follows it, "
            f"`cortex cancel {job_id}` ends it"
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(last)
    elif not screen.is_terminal:
        _print_status(last)
    outcome(last)


def jobs(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many, newest first.")] = 100,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    with open_client(directory) as client:
        found = client.jobs(limit)
    if as_json:
        print_json(found)
    elif found:
        from cortex.cli.tables import jobs_table

        console().print(jobs_table(found))
    else:
        say("no jobs yet; `cortex submit JOB.yaml` adds one")


def status(
    job_id: JobArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it ends.")] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a job stands, and what it waits for."""
    with Interrupt() as interrupt, open_client(directory) as client:
        if watch and as_json:
            _print_stream(interrupt, lambda: client.watch(job_id))
        elif watch:
            _follow(client, job_id, as_json=False, interrupt=interrupt)
        elif as_json:
            print_json(client.status(job_id))
        else:
            _print_status(client.status(job_id))


def _print_stream(interrupt: Interrupt, stream: Callable[[], Iterator[BaseModel]]) -> None:
    """Print each item of a stream as JSON on a line of its own."""
    for item in _items(interrupt, stream):
        print_json(item)


def _items(interrupt: Interrupt, stream: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """The items of a stream; a signal ends the command."""

    def produce(put: Callable[[Item], None]) -> None:
        for item in stream():
            put(item)

    try:
        yield from interrupt.read(produce)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _print_status(job: JobStatus) -> None:
    from cortex.cli.tables import facts, rounds_table, table

    screen = console()
    screen.print("\n".join(facts(job)), soft_wrap=True)
    if job.history:
        screen.print(rounds_table(job.history))
    if job.workers and not job.status.is_terminal:
        workers = table("worker", "region", "doing", "for", right=("for",))
        for worker in job.workers:
            workers.add_row(worker.worker, worker.region, worker.activity, f"{worker.since_s:.0f} s")
        screen.print(workers)


def logs(
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    directory: DirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what happened to a job, oldest first."""
    with Interrupt() as interrupt, open_client(directory) as client:
        if as_json:
            return _print_stream(interrupt, lambda: client.events(job_id, follow=follow))
        for event in _items(interrupt, lambda: client.events(job_id, follow=follow)):
            at = f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}"
            typer.echo(f"{at}  round {event.round:<4} {event.name:<20} {event.message}")
    return None


def cancel(job_id: JobArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """End a job. What it has trained so far stays."""
    with open_client(directory) as client:
        client.cancel(job_id)
        _changed(client, job_id, as_json)


def pause(job_id: JobArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Stop a job after the round in progress."""
    with open_client(directory) as client:
        client.pause(job_id)
        _changed(client, job_id, as_json)


def resume(job_id: JobArgument, directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Go on with a paused job."""
    with open_client(directory) as client:
        client.resume(job_id)
        _changed(client, job_id, as_json)


def _changed(client: Client, job_id: str, as_json: bool) -> None:
    job = client.status(job_id)
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job_id} is {job.status.value}, round {job.round} of {job.rounds}")
