"""Process ids that stay true: a pid alone may belong to somebody else after a restart."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import psutil
from pydantic import BaseModel, ConfigDict

from cortex_common.clock import SystemClock

# psutil reports start times in clock ticks since boot; equal processes differ by rounding only.
_SAME_START_S = 0.5
_LOOK_EVERY_S = 0.05


class ProcessId(BaseModel):
    """A process of this machine, told apart from later ones with the same pid."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now, if there is one."""
        try:
            return cls(pid=pid, started_s=psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    def is_alive(self) -> bool:
        """Whether this very process runs (a zombie does not)."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_s) < _SAME_START_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process is gone."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until this process is gone; False when it is still there after `timeout_s`."""
        clock = SystemClock()
        end_s = clock.monotonic_s() + timeout_s
        while self.is_alive() and clock.monotonic_s() < end_s:
            threading.Event().wait(_LOOK_EVERY_S)
        return not self.is_alive()

    def kill_group(self) -> None:
        """Kill the process and whatever it started in its process group."""
        if self.is_alive():
            kill_group(self.pid)


def kill_group(leader: int) -> None:
    """Kill a process group; nothing happens when it is empty."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
