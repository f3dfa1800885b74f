"""How a service process starts, says that it is ready, and ends."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, PreconditionError
from cortex_common.logging import get_logger

_log = get_logger(__name__)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def run_service(main: Callable[[asyncio.Event], Awaitable[None]], *, parent_pid: int | None = None) -> int:
    """Run `main` until it returns; SIGTERM and SIGINT set its stop event, a second one cancels it.

    Args:
        main: Serves until the event is set, then drains.
        parent_pid: On Linux, the process whose end also ends this one.

    Returns:
        Exit code: 0 after a clean stop, 1 after an error (told on stderr or in the log), 130 when cancelled.
    """
    allow_files()
    if parent_pid is not None:
        try:
            end_with_parent(parent_pid)
        except PreconditionError as error:
            return _told(error)
    return asyncio.run(_until_stopped(main))


def end_with_parent(parent_pid: int) -> None:
    """Get SIGTERM when the parent ends, however it ends (Linux; elsewhere nothing happens).

    Raises:
        PreconditionError: it has ended already.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise PreconditionError(f"cannot follow parent process {parent_pid}: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        raise PreconditionError(f"parent process {parent_pid} has ended")


def allow_files() -> None:
    """From now on this process may have as many files and connections open as the system lets it.

    At first that are 1024 on most systems; an aggregator needs two for each seat of a round, the others a connection.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where the kernel's own limit is lower still (macOS), it stays as it is.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def hide_memory() -> None:
    """From now on this process leaves no core dump, and only root can look into it (Linux; elsewhere nothing happens).

    For processes of Cortex's own that are about to hold what is on no disk: a person's program may want its dumps.
    """
    if sys.platform != "linux":
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


async def sleep_unless(stop: asyncio.Event, seconds: float, clock: Clock) -> bool:
    """Wait for `seconds` or until `stop` is set.

    Returns:
        True if stopped.
    """
    waits = [asyncio.ensure_future(clock.sleep(seconds)), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return stop.is_set()


def write_ready_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Tell a supervisor that the service answers: JSON with name, service, pid, address, metrics_port … in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"pid": os.getpid(), **facts}) + "\n", encoding="utf-8")
    temporary.replace(path)


async def _until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` in a task of its own, whose end, whatever it is, becomes the exit code."""
    stop = asyncio.Event()
    task = asyncio.ensure_future(main(stop))
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            task.cancel()
            return
        _log.info("stopping", signal=number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await asyncio.wait([task])
    if task.cancelled():
        return 130
    error = task.exception()
    return 0 if error is None else _ended_by(error)


def _ended_by(error: BaseException) -> int:
    """Exit code for what one or several tasks ended with: told in a line if it is a person's mistake, else logged."""
    causes = _leaves(error)
    told = [cause for cause in causes if isinstance(cause, CortexError)]
    if len(told) < len(causes):
        return _crashed(error)
    for cause in told:
        _told(cause)
    return 1


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


def _told(error: CortexError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _crashed(error: BaseException) -> int:
    _log.critical("crashed", reason=f"{type(error).__name__}: {error}", exc_info=error)
    return 1
