"""Processes of a foreign system: everything they start, however it detaches itself, stays below this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.network import BenchmarkError
from benchmarks.processes import Usage, peak_bytes, tree_of, usage_of

_PR_SET_CHILD_SUBREAPER = 36
_STOP_S = 10.0


class Nest:
    """Starts processes and knows all that come of them. Linux only."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self._variables = dict(variables)
        self._started: list[subprocess.Popen[bytes]] = []
        self._others = tree_of(os.getpid())

    def start(self, name: str, command: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        """Start a process; what it says goes to a file with its name."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._variables | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._started.append(process)
        return process

    def call(self, name: str, command: Sequence[str], timeout_s: float = 120.0) -> None:
        """Run a command to its end.

        Raises:
            BenchmarkError: it fails or takes too long.
        """
        process = self.start(name, command)
        try:
            if process.wait(timeout_s):
                raise BenchmarkError(f"{name} failed:\n{self.log(name)}")
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{name} takes more than {timeout_s:.0f} s:\n{self.log(name)}") from None

    def log(self, name: str) -> str:
        """The end of what a process said."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-3000:]

    def check(self) -> None:
        """Raises BenchmarkError if a process has failed."""
        for process in self._started:
            if process.poll():
                raise BenchmarkError(
                    f"{Path(str(process.args[0])).name} ended with {process.returncode}: {self.logs()}"
                )

    def logs(self) -> str:
        """The ends of all files, for a person to judge."""
        return "\n".join(f"--- {path.name}\n{self.log(path.stem)}" for path in sorted(self.directory.glob("*.log")))

    def usage(self) -> Usage:
        """CPU time of all of them so far, of this process too, which does nothing but wait."""
        return usage_of({"all": frozenset({os.getpid()})})

    def peak_bytes(self, is_meant: Callable[[str], bool]) -> int:
        """Peak memory of all living processes whose command line is meant, together."""
        found = 0
        for pid in tree_of(os.getpid()) - self._others:
            with contextlib.suppress(psutil.Error, OSError, RuntimeError):
                if is_meant(" ".join(psutil.Process(pid).cmdline())):
                    found += peak_bytes(pid)
        return found

    def wait_until_gone(self, part: str, timeout_s: float = 900.0) -> None:
        """Until no process is left whose command line contains a text.

        Raises:
            BenchmarkError: one doesn't end.
        """
        end_s = time.monotonic() + timeout_s
        while self.peak_bytes(lambda line: part in line):
            if time.monotonic() > end_s:
                raise BenchmarkError(f"{part} does not end: {self.logs()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End them all: politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            self._await_end()

    def _left(self) -> frozenset[int]:
        for process in self._started:
            process.poll()
        left = tree_of(os.getpid()) - self._others
        own = {process.pid for process in self._started}
        for pid in left - own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return tree_of(os.getpid()) - self._others

    def _await_end(self) -> None:
        end_s = time.monotonic() + _STOP_S
        while (left := self._left()) and time.monotonic() < end_s:
            psutil.wait_procs([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)], timeout=0.2)


@contextmanager
def nest(directory: Path, variables: Mapping[str, str]) -> Iterator[Nest]:
    """A place for processes; all of them are gone at the end of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise BenchmarkError(f"cannot keep processes together: {os.strerror(ctypes.get_errno())}")
    kept = Nest(directory, variables)
    try:
        yield kept
    finally:
        kept.stop()
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
