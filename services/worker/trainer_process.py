"""A trainer in a child process, and why that ended, if it did."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from pathlib import Path

import cortex_common
import services
from cortex_common.logging import get_logger
from services.worker import metrics
from services.worker.failures import TrainerEndedError
from services.worker.trainer_line import Trainer

_log = get_logger(__name__)

_STDERR_LINES = 12
_MAX_LINE = 400
_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "FASHION_MNIST_DIR", "SYSTEMROOT"),
)


class TrainerProcess(Trainer):
    """A trainer in a process of its own."""

    def __init__(self, process: Process, connection: socket.socket) -> None:
        """Wrap a started process; use `start`."""
        super().__init__(connection)
        self._process = process
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._output = asyncio.create_task(self._read_output())

    @classmethod
    async def start(cls, threads: int, device: str) -> TrainerProcess:
        """Start a child with nothing of this process but one socket.

        Raises:
            TrainerEndedError: the operating system refuses.
        """
        own, its = socket.socketpair()
        command = (sys.executable, "-P", "-m", "services.worker.trainer", "--socket", str(its.fileno()))
        options = ("--threads", str(threads), "--device", device)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                *options,
                pass_fds=[its.fileno()],
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=_environment(threads),
            )
        except OSError as error:
            own.close()
            raise TrainerEndedError(f"the trainer cannot be started: {error}") from error
        finally:
            its.close()
        own.setblocking(False)
        metrics.TRAINERS_STARTED.inc()
        return cls(process, own)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def _epitaph(self) -> str:
        code = await self._process.wait()
        await asyncio.wait((self._output,), timeout=1)
        self._output.cancel()
        how = f"signal {-code} ({_signal_name(-code)})" if code < 0 else f"exit code {code}"
        last = self._fatal or " | ".join(list(self._stderr)[-5:])
        reason = f"the trainer process ended by {how}" + (f": {last}" if last else "")
        if not self._is_stopping:
            metrics.TRAINERS_CRASHED.inc()
            _log.warning("trainer_ended", pid=self.pid, reason=reason)
        return reason

    async def _read_output(self) -> None:
        stream = self._process.stdout
        assert stream is not None  # noqa: S101  asked for at the start
        while line := await _line(stream):
            text = line.decode(errors="replace").rstrip()[:_MAX_LINE]
            if text:
                self._stderr.append(text)
                _log.debug("trainer_output", pid=self.pid, line=text)


def _environment(threads: int) -> dict[str, str]:
    """What the child may see: how to find programs and devices; nothing of Cortex, above all no keys."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    roots = [str(Path(module.__file__ or "").parents[1]) for module in (services, cortex_common)]
    paths = [*roots, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return (
        passed
        | counts
        | {
            "PYTHONPATH": os.pathsep.join(path for path in dict.fromkeys(paths) if path),
            "PYTHONUNBUFFERED": "1",
            # Without it cuBLAS is not deterministic.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
    )


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line, or as much of an endless one as the reader holds."""
    try:
        return await stream.readline()
    except ValueError:
        return b"(a very long line)\n"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
