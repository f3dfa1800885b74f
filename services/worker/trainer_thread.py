"""A trainer in a thread of this process: for programs that bring their own data."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future, ThreadPoolExecutor

from cortex_common.clock import SystemClock
from services.worker.link import ChildLink
from services.worker.trainer.session import OpenData, Session
from services.worker.trainer_line import Trainer, socket_pair


class TrainerThread(Trainer):
    """A trainer that sees the memory of the program it is part of."""

    def __init__(self, serving: Future[None], connection: socket.socket) -> None:
        """Wrap a thread at work; use `start`."""
        super().__init__(connection)
        self._serving = serving

    @classmethod
    async def start(cls, device: str, open_data: OpenData) -> TrainerThread:
        """Start a thread.

        Args:
            device: What `auto` means here.
            open_data: Gives the data of a job.
        """
        own, its = socket_pair()
        own.setblocking(False)
        link = ChildLink(its)
        session = Session(link, device, SystemClock(), open_data, on_gone=lambda: None)

        def serve() -> None:
            with its:
                link.send({"ready": True})
                session.serve()

        threads = ThreadPoolExecutor(1, "cortex-trainer")
        serving = threads.submit(serve)
        threads.shutdown(wait=False)
        return cls(serving, own)

    def _kill(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)

    async def _epitaph(self) -> str:
        served = asyncio.wrap_future(self._serving)
        await asyncio.wait((served,))
        error = served.exception()
        return f"the trainer ended by {type(error).__name__}: {error}" if error else "the trainer has ended"
