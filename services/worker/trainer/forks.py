"""The fork server: a process that has imported torch once, and of which every trainer of a worker is a copy.

It has one thread and never touches a device, a data set or a job: a copy begins as clean as a new process. It must stay
so, since threads, OpenMP's pools and a CUDA context do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import socket
from dataclasses import dataclass

from services.worker import fork_line
from services.worker.fork_line import ForkMessage, Kind


@dataclass(frozen=True, slots=True)
class _Child:
    number: int
    pid: int


def serve_forks(control: socket.socket) -> socket.socket | None:
    """Fork trainers until the worker is gone.

    Returns:
        In each trainer its line to the worker; in the server, at its end, None.
    """
    # What is imported stays for ever: unseen by the collector, its memory stays shared with the copies.
    gc.collect()
    gc.freeze()
    with contextlib.suppress(BrokenPipeError), control, selectors.DefaultSelector() as waiting:
        waiting.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if isinstance(key.data, _Child):
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    _tell_end(control, key.data)
                elif (request := fork_line.receive(control)) is None:
                    return None
                elif (line := _fork(control, request, waiting)) is not None:
                    return line
    return None


def _fork(control: socket.socket, request: ForkMessage, waiting: selectors.BaseSelector) -> socket.socket | None:
    """Make a trainer; its line in the trainer, None in the server."""
    line, output = request.descriptors
    pid = os.fork()
    if pid == 0:
        for key in list(waiting.get_map().values()):
            if isinstance(key.data, _Child):
                os.close(key.fd)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        return socket.socket(fileno=line)
    os.close(line)
    os.close(output)
    process = os.pidfd_open(pid)
    fork_line.send(control, ForkMessage(Kind.FORKED, request.number, pid, (process,)))
    waiting.register(process, selectors.EVENT_READ, _Child(request.number, pid))
    return None


def _tell_end(control: socket.socket, child: _Child) -> None:
    _, status = os.waitpid(child.pid, 0)
    fork_line.send(control, ForkMessage(Kind.ENDED, child.number, os.waitstatus_to_exitcode(status)))
