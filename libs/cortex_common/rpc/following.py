"""Streams that outlive a certificate: they move over to the new connection, and who reads them notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from cortex_common.errors import UnavailableError
from cortex_common.rpc.renewing import RenewingChannel

_Message = TypeVar("_Message")


async def follow(
    channel: grpc.aio.Channel,
    method: Callable[..., grpc.aio.UnaryStreamCall[Any, _Message]],
    *request: Any,
    **options: Any,
) -> AsyncGenerator[_Message]:
    """Messages of a stream that repeats the whole state at its start, through every renewal of the certificate.

    After a renewal the stream is started again over the new connection; the old one is given up once the new one has
    sent its first message. Errors of the stream are raised as they are, unless there is a new one to go on with.

    Args:
        channel: Whose method it is; a channel that does not renew is just read.
        method: Of a stub.
        request: Its argument.
        options: Of the call.
    """

    def start() -> grpc.aio.UnaryStreamCall[Any, _Message]:
        return method(*request, **options)

    call = start()
    messages = aiter(call)
    move = _Move(channel, start, call)
    try:
        while True:
            try:
                async for message in messages:
                    yield message
                moved = await move.settled()
            except asyncio.CancelledError:
                task, moved = asyncio.current_task(), move.moved
                if moved is None or (task is not None and task.cancelling()):
                    raise
            except grpc.aio.AioRpcError:
                moved = await move.settled()
                if moved is None:
                    raise
            if moved is None:
                return
            call, messages, first = moved
            move.stop()
            move = _Move(channel, start, call)
            yield first
    finally:
        move.stop()
        call.cancel()
        if move.moved is not None:
            move.moved[0].cancel()


class _Move:
    """Starts a stream anew when its channel renews, and ends the old one when the new one speaks."""

    def __init__(
        self, channel: grpc.aio.Channel, start: Callable[[], grpc.aio.UnaryStreamCall[Any, Any]], old: Any
    ) -> None:
        self.moved: tuple[Any, AsyncIterator[Any], Any] | None = None
        self._start = start
        self._old = old
        self._task: asyncio.Task[None] | None = None
        self._listening = channel.on_renewal(self._renewed) if isinstance(channel, RenewingChannel) else None
        if self._listening is not None:
            self._listening.__enter__()

    async def settled(self) -> tuple[Any, AsyncIterator[Any], Any] | None:
        """The new stream, its further messages and its first one; the server may end the old one before it speaks."""
        if self._task is not None:
            await asyncio.wait([self._task])
        return self.moved

    def stop(self) -> None:
        """Do no more."""
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
        if self._task is not None:
            self._task.cancel()

    def _renewed(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._go())

    async def _go(self) -> None:
        try:
            fresh = self._start()
        except UnavailableError:
            # Nobody calls there any more.
            return
        messages = aiter(fresh)
        try:
            first = await anext(messages)
        except (grpc.aio.AioRpcError, asyncio.CancelledError, StopAsyncIteration):
            # The old stream says itself, by its own end, if it is no longer wanted either.
            fresh.cancel()
            return
        if self.moved is not None:
            self.moved[0].cancel()  # nobody has read from it yet, and there is another renewal
        self.moved = (fresh, messages, first)
        self._old.cancel()
