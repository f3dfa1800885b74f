"""`python -m services.worker.trainer`: a trainer, or the fork server that trainers are copied from."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from cortex_common.clock import SystemClock
from cortex_common.lifecycle import hide_memory
from services.worker.link import ChildLink
from services.worker.trainer.forks import serve_forks
from services.worker.trainer.session import Session


def main() -> int:
    """Serve the worker at the other end of the socket until it is gone."""
    parser = argparse.ArgumentParser(prog="services.worker.trainer", description=__doc__)
    line = parser.add_mutually_exclusive_group(required=True)
    line.add_argument("--socket", type=int, help="descriptor of the connected Unix socket")
    line.add_argument("--fork-server", type=int, help="descriptor of the line on which trainers are asked for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    _behave()
    # Imports half of torch, as does the first optimiser: in the server, so that its copies need not.
    torch.use_deterministic_algorithms(True)
    if arguments.fork_server is None:
        connection: socket.socket | None = socket.socket(fileno=arguments.socket)
    else:
        _import_the_rest()
        connection = serve_forks(socket.socket(fileno=arguments.fork_server))
    if connection is None:
        return 0
    _take_threads(arguments.threads)
    link = ChildLink(connection)
    sys.excepthook = _tell_then_die(link)
    link.send({"ready": True, "torch": torch.__version__})
    if not link.has_message():
        _warm_up()
    Session(link, arguments.device, SystemClock(), on_sealed=hide_memory).serve()
    return 0


def _behave() -> None:
    """Leave Ctrl-C to the worker, and be the first to go when memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _take_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)


def _import_the_rest() -> None:
    """Make an optimiser, but take no step: autograd may start threads, and those do not survive a fork."""
    torch.optim.Adam(torch.nn.Linear(2, 2).parameters(), fused=True)


def _warm_up() -> None:
    """Take one step with a tiny network: the first job need not wait for what torch imports at its first use."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()


def _tell_then_die(link: ChildLink) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """An error nobody foresaw: the worker hears its name, the traceback goes to stderr, the process ends."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        if not isinstance(error, OSError):
            link.send({"fatal": f"{kind.__name__}: {error}"})

    return hook


if __name__ == "__main__":
    sys.exit(main())
