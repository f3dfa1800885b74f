"""A trainer child as its worker sees it: ask, cancel, stop; and why it ended, if it did."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cortex_common
import services
from cortex_common.errors import CorruptError
from cortex_common.logging import get_logger
from services.worker import link, metrics
from services.worker.failures import TrainerEndedError, WorkFailedError

_log = get_logger(__name__)

_STDERR_LINES = 12
_MAX_LINE = 400
_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "FASHION_MNIST_DIR", "SYSTEMROOT"),
)

Answer = Mapping[str, Any]
OnProgress = Callable[[Answer], None]


class TrainerProcess:
    """One child process. Commands are answered in order; a cancelled one ends at its next batch."""

    def __init__(self, process: Process, connection: socket.socket) -> None:
        """Wrap a started process; use `start`."""
        self._process = process
        self._connection = connection
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._progress: dict[int, OnProgress] = {}
        self._outgoing: asyncio.Queue[tuple[Mapping[str, object], Sequence[int]]] = asyncio.Queue()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._fatal = ""
        self._is_stopping = False
        self.ready = asyncio.Event()
        self.is_tainted = False
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writing = asyncio.create_task(self._write())
        self._watching = asyncio.create_task(self._watch())

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

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return not self.ended.done() and not self._is_stopping

    async def ask(
        self,
        op: str,
        body: Mapping[str, object],
        descriptors: Sequence[int] = (),
        on_progress: OnProgress | None = None,
    ) -> Answer:
        """Give a command and wait for its answer. If this wait is cancelled, so is the command.

        Raises:
            WorkFailedError: it cannot be done; says why.
            TrainerEndedError: the child ended first; says how.
        """
        if self.ended.done():
            raise TrainerEndedError(self.ended.result())
        number = next(self._ids)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        if on_progress is not None:
            self._progress[number] = on_progress
        self._outgoing.put_nowait(({"op": op, "id": number, **body}, descriptors))
        try:
            return _result(await answer)
        except asyncio.CancelledError:
            self._outgoing.put_nowait(({"op": "cancel", "id": number}, ()))
            raise
        finally:
            self._progress.pop(number, None)
            self._answers.pop(number, None)

    async def stop(self) -> None:
        """End the child at once; its memory and devices are free afterwards."""
        self._is_stopping = True
        if self._process.returncode is None:
            self._process.kill()
        self._writing.cancel()
        await asyncio.wait((self._writing, self._watching))
        self._connection.close()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message, descriptors = await self._outgoing.get()
            header, body = link.encode(message)
            try:
                if descriptors:
                    socket.send_fds(self._connection, [header], list(descriptors))
                    header = b""
                await loop.sock_sendall(self._connection, header + body)
            except OSError:
                return

    async def _watch(self) -> None:
        """Read answers and output until the child ends, then tell everybody who waits."""
        output = asyncio.create_task(self._read_output())
        try:
            while (message := await self._receive()) is not None:
                self._take(message)
        except (OSError, CorruptError) as error:
            self._fatal = self._fatal or str(error)
            if self._process.returncode is None:
                self._process.kill()
        code = await self._process.wait()
        await asyncio.wait((output,), timeout=1)
        output.cancel()
        reason = self._epitaph(code)
        if not self._is_stopping:
            metrics.TRAINERS_CRASHED.inc()
            _log.warning("trainer_ended", pid=self.pid, reason=reason)
        self.ended.set_result(reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(TrainerEndedError(reason))

    async def _receive(self) -> link.Message | None:
        header = await self._exactly(link.HEADER_BYTES)
        body = await self._exactly(link.body_length(header)) if header else b""
        return link.decode(body) if body else None

    async def _exactly(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts = bytearray()
        while len(parts) < count:
            part = await loop.sock_recv(self._connection, count - len(parts))
            if not part:
                return b""
            parts += part
        return bytes(parts)

    def _take(self, message: link.Message) -> None:
        if message.get("ready"):
            self.ready.set()
        self._fatal = str(message.get("fatal") or self._fatal)
        self.is_tainted = self.is_tainted or bool(message.get("tainted"))
        number = message.get("id")
        if not isinstance(number, int):
            return
        progress = message.get("progress")
        if isinstance(progress, dict):
            if tell := self._progress.get(number):
                tell(progress)
            return
        answer = self._answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _read_output(self) -> None:
        stream = self._process.stdout
        assert stream is not None  # noqa: S101  asked for at the start
        while line := await _line(stream):
            text = line.decode(errors="replace").rstrip()[:_MAX_LINE]
            if text:
                self._stderr.append(text)
                _log.debug("trainer_output", pid=self.pid, line=text)

    def _epitaph(self, code: int) -> str:
        """How it ended, for a status page."""
        how = f"signal {-code} ({_signal_name(-code)})" if code < 0 else f"exit code {code}"
        last = self._fatal or " | ".join(list(self._stderr)[-5:])
        return f"the trainer process ended by {how}" + (f": {last}" if last else "")


def _result(message: Answer) -> Answer:
    if "failed" in message:
        raise WorkFailedError(str(message["failed"]), is_permanent=bool(message.get("permanent")))
    if "cancelled" in message:
        raise WorkFailedError("cancelled", is_permanent=False)
    done = message.get("done")
    return done if isinstance(done, dict) else {}


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
