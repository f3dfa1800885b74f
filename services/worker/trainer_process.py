"""A trainer in a child process, and why that ended, if it did."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from pathlib import Path

import cortex_common
import services
from cortex_common.logging import get_logger
from services.worker import metrics
from services.worker.failures import TrainerEndedError
from services.worker.fork_server import ForkedProcess, ForkServer
from services.worker.output_tail import OutputTail
from services.worker.trainer_line import Trainer, socket_pair

_log = get_logger(__name__)

_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "FASHION_MNIST_DIR", "SYSTEMROOT"),
)


class TrainerProcess(Trainer):
    """A trainer in a process of its own."""

    def __init__(self, process: Process | ForkedProcess, connection: socket.socket) -> None:
        """Wrap a started process; use `start` or `fork`."""
        super().__init__(connection)
        self._process = process
        assert process.stdout is not None  # noqa: S101  asked for at the start
        self._output = OutputTail(process.stdout, process.pid)

    @classmethod
    async def start(cls, threads: int, device: str) -> TrainerProcess:
        """Start a child with nothing of this process but one socket.

        Raises:
            TrainerEndedError: the operating system refuses.
        """
        own, its = socket_pair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *_command(threads, device), "--socket", str(its.fileno())),
                pass_fds=[its.fileno()],
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=_environment(threads),
            )
        except OSError as error:
            own.close()
            raise TrainerEndedError(f"the trainer cannot be started: {error}") from error
        except asyncio.CancelledError:
            own.close()
            raise
        finally:
            its.close()
        return cls._started(process, own)

    @classmethod
    async def fork(cls, server: ForkServer) -> TrainerProcess:
        """Start one as a copy of a process that has imported all that a trainer needs.

        Raises:
            TrainerEndedError: there is none to be had; says why.
        """
        own, its = socket_pair()
        try:
            process = await server.fork(its)
        except BaseException:
            own.close()
            raise
        finally:
            its.close()
        return cls._started(process, own)

    @classmethod
    def _started(cls, process: Process | ForkedProcess, own: socket.socket) -> TrainerProcess:
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
        last = self._fatal or await self._output.finish()
        reason = f"the trainer process ended by {_how(code)}" + (f": {last}" if last else "")
        if not self._is_stopping:
            metrics.TRAINERS_CRASHED.inc()
            _log.warning("trainer_ended", pid=self.pid, reason=reason)
        return reason


def fork_server(threads: int, device: str) -> ForkServer:
    """A server of trainers; not started yet."""
    return ForkServer((*_command(threads, device), "--fork-server"), _environment(threads))


def _command(threads: int, device: str) -> tuple[str, ...]:
    """Arguments of Python."""
    return ("-P", "-m", "services.worker.trainer", "--threads", str(threads), "--device", device)


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
            # Whether there is a GPU is asked of NVML: CUDA, once begun, does not survive a fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # Without it cuBLAS is not deterministic.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
    )


def _how(code: int | None) -> str:
    if code is None:
        return "a cause that nobody knows: the process it was forked from is gone"
    return f"signal {-code} ({_signal_name(-code)})" if code < 0 else f"exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
