"""Ports of this machine: which are free, and keeping them for a network while it runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from cortex.local.members import HOST
from cortex_common.errors import PreconditionError


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            _bind(probe, port)
            probe.listen(1)
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def claims_folder() -> Path:
    """Where the networks of this user note their ports: one locked file a port.

    Raises:
        PreconditionError: somebody else put something there.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    folder = base / f"cortex-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PreconditionError(
            f"{folder} does not belong to you; remove it, or set XDG_RUNTIME_DIR to a folder of yours"
        )
    return folder


class PortClaims:
    """Ports kept for one network, as a context manager.

    Between two lives of a service nothing listens on its port, and another network that starts at that moment, or any
    outgoing connection, would take it. Against the former there is a file lock, which ends with the process that holds
    it; against the latter, on Linux, a socket that is bound and does not listen: servers can bind beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[int, contextlib.ExitStack] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for held in self._held.values():
            held.close()
        self._held.clear()

    def claim(self, port: int) -> bool:
        """Keep a port; False when somebody listens on it or another network keeps it."""
        if port in self._held:
            return True
        with contextlib.ExitStack() as held:
            file = held.enter_context((self._folder / str(port)).open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not is_free(port):
                return False
            if sys.platform == "linux":
                _bind(held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)), port)
            self._held[port] = held.pop_all()
        return True


def _bind(holder: socket.socket, port: int) -> None:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((HOST, port))
