"""One supervised process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import BinaryIO

from cortex.local.layout import Layout
from cortex.local.members import Member
from cortex.local.processes import ProcessId, kill_group
from cortex.local.status import ProcessReport
from cortex_common.clock import Clock

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
# Who lived this long starts with a short wait again.
SETTLED_S = 10.0
MAX_LOG_BYTES = 32 << 20
# glibc gives freed memory back to the kernel and takes it again, page fault by page fault, chunk after chunk: keeping
# some costs a few megabytes a process and saves a third of the workers' CPU time in an exchange.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
# Settings of the services that a person may give to all of them at once; other CORTEX_* variables are the client's.
_PASSED = ("CORTEX_LOG_LEVEL", "CORTEX_LOG_JSON", "CORTEX_FAILPOINT")


def next_wait_s(previous_s: float, lived_s: float) -> float:
    """How long to wait before the next start: doubling while the process dies young."""
    return FIRST_WAIT_S if lived_s >= SETTLED_S or not previous_s else min(previous_s * 2, LONGEST_WAIT_S)


def child_environment(environment: Mapping[str, str], parent: int) -> dict[str, str]:
    """The environment of a service: the person's own, without what is meant for the client."""
    kept = {key: value for key, value in environment.items() if not key.startswith("CORTEX_") or key in _PASSED}
    return {**ALLOCATOR, "PYTHONUNBUFFERED": "1", **kept, "CORTEX_PARENT_PID": str(parent)}


class Child:
    """A process that is started again whenever it ends, until it is stopped."""

    def __init__(self, member: Member, layout: Layout, clock: Clock, on_change: Callable[[], None]) -> None:
        self.member = member
        self.restarts = 0
        self.last_exit: str | None = None
        self._layout = layout
        self._clock = clock
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._identity: ProcessId | None = None

    def report(self) -> ProcessReport:
        """What there is to say about it."""
        return ProcessReport(
            name=self.member.name, process=self._identity, restarts=self.restarts, last_exit=self.last_exit
        )

    async def keep(self) -> None:
        """Run it, over and over; never returns."""
        wait_s = 0.0
        while True:
            started_s = self._clock.monotonic_s()
            process = await self._start()
            code = await process.wait()
            kill_group(process.pid)
            self._identity = None
            self.last_exit = exit_words(code)
            wait_s = next_wait_s(wait_s, self._clock.monotonic_s() - started_s)
            self.restarts += 1
            self._on_change()
            await self._clock.sleep(wait_s)

    async def stop(self, grace_s: float) -> None:
        """Ask it to end, and end it when it does not within `grace_s`."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace_s)
        kill_group(process.pid)
        await process.wait()
        self._identity = None
        self._on_change()

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            kill_group(self._process.pid)

    async def _start(self) -> asyncio.subprocess.Process:
        self._layout.ready(self.member.name).unlink(missing_ok=True)
        config = self._layout.config(self.member.name)
        with self._open_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cortex", "serve", self.member.service.value, "--config", str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=child_environment(os.environ, os.getpid()),
            )
        self._identity = ProcessId.of(self._process.pid)
        self._on_change()
        return self._process

    def _open_log(self) -> BinaryIO:
        path = self._layout.log(self.member.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")


def exit_words(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
