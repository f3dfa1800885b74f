"""`python -m services.worker.trainer --socket FD`: the child's entry point."""

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
from services.worker.link import ChildLink
from services.worker.trainer.session import Session


def main() -> int:
    """Serve the worker at the other end of the socket until it is gone."""
    parser = argparse.ArgumentParser(prog="services.worker.trainer", description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the connected Unix socket")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    _behave()
    _make_deterministic(arguments.threads)
    link = ChildLink(socket.socket(fileno=arguments.socket))
    sys.excepthook = _tell_then_die(link)
    link.send({"ready": True, "torch": torch.__version__})
    if not link.has_message():
        _warm_up()
    Session(link, arguments.device, SystemClock()).serve()
    return 0


def _behave() -> None:
    """Leave Ctrl-C to the worker, and be the first to go when memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _make_deterministic(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)


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
