"""The worker's end of the line to a trainer, wherever that runs: ask, cancel, and hear that it ended."""

from __future__ import annotations

import asyncio
import itertools
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cortex_common.errors import CorruptError
from services.worker import link
from services.worker.failures import TrainerEndedError, WorkFailedError

Answer = Mapping[str, Any]
OnProgress = Callable[[Answer], None]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a line: the worker's and the trainer's.

    Raises:
        TrainerEndedError: the operating system refuses.
    """
    try:
        return socket.socketpair()
    except OSError as error:
        raise TrainerEndedError(f"the trainer cannot be started: {error}") from error


class Trainer(ABC):
    """One trainer. Commands are answered in order; a cancelled one ends at its next batch."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the worker's end of a connected, non-blocking socket."""
        self._connection = connection
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._progress: dict[int, OnProgress] = {}
        self._outgoing: asyncio.Queue[tuple[Mapping[str, object], Sequence[int]]] = asyncio.Queue()
        self._fatal = ""
        self._is_stopping = False
        self.ready = asyncio.Event()
        self.is_tainted = False
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writing = asyncio.create_task(self._write())
        self._watching = asyncio.create_task(self._watch())

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
            TrainerEndedError: it ended first; says how.
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
        """End the trainer at once; its memory and devices are free afterwards."""
        self._is_stopping = True
        self._kill()
        self._writing.cancel()
        await asyncio.wait((self._writing, self._watching))
        self._connection.close()

    @abstractmethod
    def _kill(self) -> None:
        """Make it end, if it has not."""

    @abstractmethod
    async def _epitaph(self) -> str:
        """How it ended, for a status page; waits until it has."""

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
        """Read answers until the trainer ends, then tell everybody who waits."""
        try:
            while (message := await self._receive()) is not None:
                self._take(message)
        except (OSError, CorruptError) as error:
            self._fatal = self._fatal or str(error)
            self._kill()
        reason = await self._epitaph()
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


def _result(message: Answer) -> Answer:
    if "failed" in message:
        raise WorkFailedError(str(message["failed"]), is_permanent=bool(message.get("permanent")))
    if "cancelled" in message:
        raise WorkFailedError("cancelled", is_permanent=False)
    done = message.get("done")
    return done if isinstance(done, dict) else {}
