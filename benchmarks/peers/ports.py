"""Ports for systems that want to be told theirs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from benchmarks.network import BenchmarkError

_START_S = 60.0
HOST = "127.0.0.1"


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, check: Callable[[], None]) -> None:
    """Until something listens on a port.

    Args:
        port: Of this machine.
        check: Raises if it is no use to go on.

    Raises:
        BenchmarkError: nothing does.
    """
    end_s = time.monotonic() + _START_S
    while True:
        check()
        try:
            socket.create_connection((HOST, port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > end_s:
                raise BenchmarkError(f"nothing listens on port {port} after {_START_S:.0f} s") from None
            time.sleep(0.1)
        else:
            return
