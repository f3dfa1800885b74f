"""Following a job on a terminal, or in plain lines where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from cortex.cli.tables import facts, number, rounds_table, size, table
from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CortexError
from cortex_common.job.status import JobStatus, RoundReport

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cortex.cli.interrupt import Interrupt
    from cortex.client import Client

SHOWN_ROUNDS = 12
# Without a terminal: say again what is waited for when nothing else was said for this long.
SILENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Away:
    """The coordinator cannot be reached, and why."""

    reason: str


def follow(client: Client, job_id: str, console: Console, interrupt: Interrupt) -> JobStatus:
    """Show a job until it has ended, on this console.

    Returns:
        The last status.

    Raises:
        KeyboardInterrupt: a signal came first.
    """

    def produce(put: Callable[[JobStatus | Away], None]) -> None:
        for status in client.watch(job_id, lambda reason: put(Away(reason))):
            put(status)

    view: LiveView | PlainView = LiveView(console) if console.is_terminal else PlainView(console)
    last: JobStatus | None = None
    with view:
        for news in interrupt.read(produce):
            if isinstance(news, Away):
                view.away(news.reason)
            else:
                view.show(news)
                last = news
    return last if last is not None and last.status.is_terminal else client.status(job_id)


def outcome(status: JobStatus) -> None:
    """Nothing for a job that was completed.

    Raises:
        CortexError: it failed or was cancelled; says why.
    """
    if status.status.value == "completed":
        return
    raise CortexError(f"job {status.job_id} {status.status.value}" + (f": {status.error}" if status.error else ""))


class LiveView:
    """A picture of the job that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._status: JobStatus | None = None
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, status: JobStatus) -> None:
        """Draw this status."""
        self._status = status
        self._live.update(picture(status), refresh=True)

    def away(self, reason: str) -> None:
        """Say that nothing new can be known for now."""
        status = self._status
        note = Text(f"{reason}; trying again", style="yellow")
        self._live.update(Group(picture(status), note) if status else note, refresh=True)


class PlainView:
    """A line for each thing that happens: for log files and pipes."""

    def __init__(self, console: Console, clock: Clock | None = None) -> None:
        self._console = console
        self._clock = clock or SystemClock()
        self._phase = ""
        self._rounds = 0
        self._away = False
        self._said_s = self._clock.monotonic_s()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, status: JobStatus) -> None:
        """Say what is new in this status."""
        self._away = False
        for report in status.history[self._rounds :]:
            self._say(round_line(report, status.rounds))
        self._rounds = max(self._rounds, len(status.history))
        quiet = self._clock.monotonic_s() - self._said_s >= SILENCE_S
        if (status.status.value != self._phase and (not self._rounds or status.status.value in _NEWS)) or quiet:
            wait = f", waiting for {status.waiting_for}" if status.waiting_for else ""
            self._say(f"{status.status.value}: round {status.round}/{status.rounds}{wait}")
        self._phase = status.status.value

    def away(self, reason: str) -> None:
        """Say once that nothing new can be known for now."""
        if not self._away:
            self._say(f"{reason}; trying again")
        self._away = True

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)
        self._said_s = self._clock.monotonic_s()


_NEWS = {"paused", "completed", "failed", "cancelled"}


def round_line(report: RoundReport, rounds: int) -> str:
    """A finished round in one line."""
    metrics = report.metrics
    known = [(word, metrics.get(key)) for word, key in _METRICS]
    told = ", ".join(f"{word} {number(value)}" for word, value in known if value is not None)
    dropped = f", dropped {', '.join(f'{d.worker} ({d.reason})' for d in report.dropped)}" if report.dropped else ""
    return (
        f"round {report.round}/{rounds}: {told + ', ' if told else ''}{report.seconds:.1f} s "
        f"(training {report.train_seconds:.1f}, exchange {report.exchange_seconds:.1f}), "
        f"{size(report.bytes_up)} up, {size(report.bytes_down)} down, "
        f"{report.accepted}/{report.participants} accepted{dropped}"
    )


_METRICS = (("loss", "train_loss"), ("test loss", "test_loss"), ("accuracy", "test_accuracy"))


def picture(status: JobStatus) -> RenderableType:
    """The whole job: state, progress, rounds, workers."""
    parts: list[RenderableType] = [Text("\n".join(facts(status)))]
    parts.append(ProgressBar(total=max(status.rounds, 1), completed=len(status.history), width=60))
    if status.history:
        parts.append(rounds_table(status.history[-SHOWN_ROUNDS:]))
    if status.workers and not status.status.is_terminal:
        workers = table("worker", "region", "doing", "for", right=("for",))
        for worker in status.workers:
            workers.add_row(worker.worker, worker.region, worker.activity, f"{worker.since_s:.0f} s")
        parts.append(workers)
    return Group(*parts)
