"""Ports of this machine: which are free, and keeping them for a network while it runs."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from cortex.local.members import HOST
from cortex_common.errors import PreconditionError


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
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

    Between two lives of a service nothing listens on its port: without a claim another network that starts at that
    moment would take it. A claim is a file lock, so it ends with the process that holds it, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[int, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._held.values():
            file.close()
        self._held.clear()

    def claim(self, port: int) -> bool:
        """Keep a port; False when somebody listens on it or another network keeps it."""
        if port in self._held:
            return True
        file = (self._folder / str(port)).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        if not is_free(port):
            file.close()
            return False
        self._held[port] = file
        return True
