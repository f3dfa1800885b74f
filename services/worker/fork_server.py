"""The worker's end of the fork server: asks for trainers, and hears how they ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Mapping

from cortex_common.logging import get_logger
from services.worker import fork_line
from services.worker.failures import TrainerEndedError
from services.worker.fork_line import ForkMessage, Kind
from services.worker.output_tail import OutputTail

_log = get_logger(__name__)

IS_POSSIBLE = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")
"""Whether this system has what it takes: processes behind descriptors (Linux)."""


class ForkedProcess:
    """A process that the fork server made; used like one of `asyncio.subprocess`."""

    def __init__(self, pid: int, descriptor: int, stdout: asyncio.StreamReader) -> None:
        """Take over the descriptor of the process."""
        self.pid = pid
        self.stdout = stdout
        self._descriptor = descriptor
        self._code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        """As `subprocess` gives it; None while it runs, and when nobody knows any more."""
        return self._code.result() if self._code.done() else None

    def kill(self) -> None:
        """End it, if it has not ended. No other process can be meant."""
        if not self._code.done():
            try:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            except ProcessLookupError:
                return  # it has ended; the server is about to say how

    async def wait(self) -> int | None:
        """The return code, once it has ended; None if the server ended first and nobody knows."""
        return await asyncio.shield(self._code)

    def end(self, code: int | None) -> None:
        """Note that it has ended."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        if not self._code.done():
            self._code.set_result(code)
            os.close(self._descriptor)

    def orphan(self) -> None:
        """Watch it alone from now on: the server is gone."""
        asyncio.get_running_loop().add_reader(self._descriptor, self.end, None)


class ForkServer:
    """One process with torch imported, and the trainers it made; started at first use, and again when it was killed."""

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]) -> None:
        """Prepare one; nothing is started yet.

        Args:
            command: Arguments of Python; the descriptor of the line is put behind them.
            environment: All that it and its trainers see.
        """
        self._command = command
        self._environment = environment
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()
        self._line: _Line | None = None

    async def fork(self, connection: socket.socket) -> ForkedProcess:
        """A new process that serves the worker at this connection, whose other end is the caller's.

        Raises:
            TrainerEndedError: there is none to be had; says why.
        """
        try:
            line = await self._alive()
            return await line.fork(next(self._numbers), connection)
        except OSError as error:
            raise TrainerEndedError(f"the trainer cannot be started: {error}") from error

    async def _alive(self) -> _Line:
        async with self._starting:
            if self._line is None or self._line.is_lost:
                self._line = await _Line.open(self._command, self._environment)
            return self._line

    async def close(self) -> None:
        """End the server; trainers end by their own line."""
        if self._line is not None:
            await self._line.close()


class _Line:
    """A started server."""

    def __init__(self, process: Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        assert process.stdout is not None  # noqa: S101  asked for at the start
        self._output = OutputTail(process.stdout, process.pid)
        self._asked: dict[int, tuple[asyncio.Future[ForkedProcess], asyncio.StreamReader]] = {}
        self._running: dict[int, ForkedProcess] = {}
        self.is_lost = False
        self._losing: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(control, self._on_readable)

    @classmethod
    async def open(cls, command: tuple[str, ...], environment: Mapping[str, str]) -> _Line:
        """Start a server.

        Raises:
            OSError: the operating system refuses.
        """
        own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, str(its.fileno())),
                pass_fds=[its.fileno()],
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=environment,
            )
        except BaseException:
            own.close()
            raise
        finally:
            its.close()
        return cls(process, own)

    async def fork(self, number: int, connection: socket.socket) -> ForkedProcess:
        """Ask for a process and wait for it.

        Raises:
            OSError: the system refuses.
            TrainerEndedError: the server ended.
        """
        reader = asyncio.StreamReader()
        output, its = os.pipe()
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(output, "rb"))
            asked: asyncio.Future[ForkedProcess] = loop.create_future()
            self._asked[number] = (asked, reader)
            fork_line.send(self._control, ForkMessage(Kind.FORK, number, 0, (connection.fileno(), its)))
        finally:
            os.close(its)
        try:
            return await asked
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """End it."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._lose()
        if self._losing is not None:
            await asyncio.wait((self._losing,))

    def _on_readable(self) -> None:
        try:
            message = fork_line.receive(self._control)
        except BlockingIOError:
            return
        except OSError:
            message = None
        if message is None:
            self._lose()
        elif message.kind is Kind.FORKED:
            self._forked(message)
        elif (process := self._running.pop(message.number, None)) is not None:
            process.end(message.value)

    def _forked(self, message: ForkMessage) -> None:
        [descriptor] = message.descriptors
        asked, reader = self._asked.get(message.number, (None, None))
        if asked is None or reader is None or asked.done():
            os.close(descriptor)  # not wanted any more; its line is closed, so it ends
            return
        process = ForkedProcess(message.value, descriptor, reader)
        self._running[message.number] = process
        asked.set_result(process)

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            for process in self._running.values():
                process.orphan()
            self._running.clear()
            self._losing = asyncio.create_task(self._tell_why())

    async def _tell_why(self) -> None:
        code = await self._process.wait()
        last = await self._output.finish()
        reason = f"the trainers' fork server ended with code {code}" + (f": {last}" if last else "")
        _log.info("fork_server_ended", pid=self._process.pid, reason=reason)
        for asked, _ in self._asked.values():
            if not asked.done():
                asked.set_exception(TrainerEndedError(reason))
