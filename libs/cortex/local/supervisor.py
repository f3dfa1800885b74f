"""Starts the processes of a local network, starts them again when they die, stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from cortex.local.child import Child
from cortex.local.joining import Operator
from cortex.local.layout import Layout
from cortex.local.members import ORDER, Member
from cortex.local.network import LocalNetwork
from cortex.local.processes import ProcessId
from cortex.local.status import (
    Health,
    Phase,
    SupervisorReport,
    health_of,
    last_lines,
    read_report,
    write_report,
)
from cortex_common.clock import Clock
from cortex_common.errors import PreconditionError, UnavailableError
from cortex_common.identity import Role
from cortex_common.logging import get_logger

_log = get_logger(__name__)

START_TIMEOUT_S = 120.0
# A service that dies this often before it was ever ready will not become ready.
START_DEATHS = 3
PROBE_EVERY_S = 0.15
# What a service gets for an orderly end before it is killed.
GRACE_S = 4.0
# Those that need others leave first.
STOP_STAGES = ({Role.WORKER, Role.GATEWAY}, {Role.AGGREGATOR}, {Role.COORDINATOR}, {Role.DISCOVERY})


class Supervisor:
    """The processes of one network, for as long as `running` lasts."""

    def __init__(self, layout: Layout, network: LocalNetwork, clock: Clock) -> None:
        self._layout = layout
        self._clock = clock
        self._phase = Phase.STARTING
        self._keepers: list[asyncio.Task[None]] = []
        self._children = tuple(Child(member, layout, clock, self._tell) for member in ordered(network.members))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep all processes running inside the block; none is left behind after it."""
        self._publish()
        self._keepers = [asyncio.create_task(child.keep()) for child in self._children]
        try:
            yield
        finally:
            await self._stop()

    async def broken(self) -> None:
        """Wait, for ever if all is well; raises what keeps a process from being started."""
        await asyncio.gather(*self._keepers)

    async def until_healthy(self, on_ready: Callable[[Member], None], timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every service says it is ready.

        Raises:
            UnavailableError: one keeps dying, or is not ready in time; with the end of its log.
        """
        deadline = self._clock.monotonic_s() + timeout_s
        waiting = {child.member.name: child for child in self._children}
        while waiting:
            for child in list(waiting.values()):
                health, why = await asyncio.to_thread(self._ready, child)
                if health is Health.HEALTHY:
                    on_ready(waiting.pop(child.member.name).member)
                elif child.restarts >= START_DEATHS:
                    raise self._start_failure(child.member.name, f"died {child.restarts} times ({child.last_exit})")
                elif self._clock.monotonic_s() > deadline:
                    raise self._start_failure(child.member.name, f"not ready after {timeout_s:.0f} s: {why}")
            await self._clock.sleep(PROBE_EVERY_S)

    def announce(self) -> None:
        """Say that the network can be used: whoever started it in the background waits for this."""
        self._phase = Phase.RUNNING
        self._publish()

    def _ready(self, child: Child) -> tuple[Health, str]:
        return health_of(self._layout, child.member, child.report(), "/readyz")

    def _start_failure(self, name: str, what: str) -> UnavailableError:
        tail = last_lines(self._layout, name)
        return UnavailableError(f"{name} {what}; the end of {self._layout.log(name)}:\n{tail}")

    async def _stop(self) -> None:
        self._phase = Phase.STOPPING
        self._tell()
        await _cancel(*self._keepers)
        for stage in STOP_STAGES:
            leaving = [child for child in self._children if child.member.service in stage]
            await asyncio.gather(*(child.stop(GRACE_S) for child in leaving))

    def kill(self) -> None:
        """End every process at once."""
        for child in self._children:
            child.kill()

    def _tell(self) -> None:
        """Say what is new. Where that cannot be written, who looks sees what was before, and no process ends for it."""
        try:
            self._publish()
        except OSError as error:
            _log.warning("report_not_written", reason=str(error))

    def _publish(self) -> None:
        own = ProcessId.of(os.getpid())
        assert own is not None  # noqa: S101  # this process exists
        reports = tuple(child.report() for child in self._children)
        write_report(self._layout, SupervisorReport(supervisor=own, phase=self._phase, processes=reports))


def ordered(members: Sequence[Member]) -> list[Member]:
    """Members in the order they are started."""
    return sorted(members, key=lambda member: ORDER.index(member.service))


@contextlib.contextmanager
def exclusive(layout: Layout) -> Iterator[None]:
    """Hold the directory; what a supervisor that was killed left behind is cleaned up first.

    Raises:
        PreconditionError: a network runs in this directory already.
    """
    layout.root.mkdir(parents=True, exist_ok=True)
    with layout.lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreconditionError(_already_running(layout)) from None
        clean_up(layout)
        try:
            yield
        finally:
            for file in layout.run.glob("*.json"):
                file.unlink(missing_ok=True)


def _already_running(layout: Layout) -> str:
    report = read_report(layout)
    pid = f" (pid {report.supervisor.pid})" if report else ""
    return (
        f"a network is already running in {layout.root}{pid}; `cortex ps --dir {layout.root}` shows it, "
        f"`cortex down --dir {layout.root}` stops it"
    )


def clean_up(layout: Layout) -> list[str]:
    """End processes of a supervisor that is gone, remove their run files; the names of those that still lived."""
    report = read_report(layout)
    survivors = [entry for entry in report.processes if entry.process and entry.process.is_alive()] if report else []
    for entry in survivors:
        if entry.process:
            entry.process.kill_group()
            entry.process.wait_gone(GRACE_S)
    for file in layout.run.glob("*.json"):
        file.unlink(missing_ok=True)
    return [entry.name for entry in survivors]


async def supervise(
    layout: Layout,
    network: LocalNetwork,
    clock: Clock,
    on_member: Callable[[Member], None],
    on_healthy: Callable[[], None],
) -> None:
    """Run a prepared network until SIGINT, SIGTERM or SIGHUP; a second signal ends it at once.

    Raises:
        UnavailableError: a service does not become ready.
    """
    supervisor = Supervisor(layout, network, clock)
    stop = asyncio.Event()
    _on_signals(lambda: supervisor.kill() if stop.is_set() else stop.set())
    async with supervisor.running():
        stopped = asyncio.create_task(stop.wait())
        broken = asyncio.create_task(supervisor.broken())
        operator = Operator(layout, network, clock)
        healthy = asyncio.create_task(supervisor.until_healthy(on_member))
        joined = asyncio.create_task(operator.join(stop))
        keeping = asyncio.create_task(operator.keep_after(joined))
        try:
            done = await _first(stopped, broken, healthy)
            # Nobody can use it before the operator has a certificate.
            if done is healthy and await _first(stopped, broken, joined) is joined:
                supervisor.announce()
                on_healthy()
                await _first(stopped, broken, keeping)
        finally:
            await _cancel(stopped, healthy, broken, joined, keeping)


async def _first(*tasks: asyncio.Task[Any]) -> asyncio.Task[Any]:
    """The first task that ends; if it ended with an error, that error."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    first = next(task for task in tasks if task in done)
    first.result()
    return first


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _on_signals(act: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            loop.add_signal_handler(number, act)
