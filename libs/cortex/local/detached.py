"""A supervisor in the background, and stopping one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from cortex.local.layout import Layout
from cortex.local.processes import ProcessId
from cortex.local.status import Phase, SupervisorReport, running_report
from cortex.local.supervisor import GRACE_S, STOP_STAGES, clean_up, exclusive
from cortex_common.errors import PreconditionError, UnavailableError

LOOK_EVERY_S = 0.1
# All stages of an orderly stop, and some air.
STOP_TIMEOUT_S = GRACE_S * len(STOP_STAGES) + 5.0


def start_detached(
    layout: Layout,
    options: Sequence[str],
    on_line: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> SupervisorReport:
    """Start a supervisor in a session of its own; returns once every service is healthy.

    Args:
        layout: Of the network's directory.
        options: Further options of `cortex up`.
        on_line: Told each line the supervisor writes.
        on_wait: Called again and again while waiting; what it raises stops the network again.

    Raises:
        PreconditionError: a network runs there already.
        UnavailableError: a service does not become healthy; everything is stopped again.
    """
    with exclusive(layout):
        layout.logs.mkdir(parents=True, exist_ok=True)
    with layout.supervisor_log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cortex", "up", "--dir", str(layout.root), "--in-background", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return _until_running(layout, process, on_line, on_wait)
    except BaseException:
        _end(process)
        raise


def _until_running(
    layout: Layout, process: subprocess.Popen[bytes], on_line: Callable[[str], None], on_wait: Callable[[], None]
) -> SupervisorReport:
    """Wait for the supervisor's good news, passing on what it writes."""
    with layout.supervisor_log.open(errors="replace") as log:
        while True:
            ended = process.poll() is not None
            for line in log:
                if "error: " in line or ended:
                    raise UnavailableError((line + log.read()).removeprefix("error: ").rstrip())
                on_line(line.rstrip())
            if ended:
                raise UnavailableError(f"the supervisor ended with exit code {process.returncode}")
            report = running_report(layout)
            if report is not None and report.supervisor.pid == process.pid and report.phase is Phase.RUNNING:
                return report
            on_wait()
            threading.Event().wait(LOOK_EVERY_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have the supervisor stop everything it started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop_network(layout: Layout) -> bool:
    """Stop the network of a directory and wait until all its processes are gone.

    Returns:
        False when it was not running; what a killed supervisor left behind is cleaned up then.
    """
    report = running_report(layout)
    if report is None:
        with contextlib.suppress(PreconditionError), exclusive(layout):
            pass
        return False
    report.supervisor.send(signal.SIGTERM)
    if not report.supervisor.wait_gone(STOP_TIMEOUT_S):
        report.supervisor.send(signal.SIGKILL)
        report.supervisor.wait_gone(GRACE_S)
    clean_up(layout)
    for process in _processes(report):
        process.kill_group()
        process.wait_gone(GRACE_S)
    return True


def _processes(report: SupervisorReport) -> list[ProcessId]:
    return [entry.process for entry in report.processes if entry.process is not None]
