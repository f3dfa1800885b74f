"""One WebSocket as messages and frames, bounded in both directions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar, cast

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, InvalidArgumentError
from cortex_common.network import messages as m
from cortex_common.network.close_codes import Close, close_code_of
from cortex_common.network.protocol import MAX_TEXT_BYTES, Envelope, TenzroProtocol, error_message
from cortex_common.rpc.errors import status_of
from cortex_common.rpc.server import MAX_MESSAGE_BYTES
from services.gateway import metrics
from services.gateway.websocket.doorstep import Doorstep

PING_EVERY_S = 20.0
CLOSE_S = 5.0
MAX_WAITING_BYTES = 2 * MAX_MESSAGE_BYTES
"""What may wait in memory for a node to take it: one message, and answers to its pings."""
MAX_FRAGMENTS = 4096
_MAX_REASON_BYTES = 123
T = TypeVar("T")


class Ended(Exception):  # noqa: N818 - mostly it is none
    """The connection is over, by the node or by us; `code` is what we close it with."""

    def __init__(self, code: Close = Close.DONE, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class NodeConnection(ServerConnection):
    """A WebSocket that waits at the doorstep; dropped when its peer asks for ever more and takes nothing of it."""

    doorstep: Doorstep

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected."""
        super().connection_made(cast(asyncio.Transport, transport))
        self.doorstep.arrive(self, str((transport.get_extra_info("peername") or ("",))[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self.doorstep.leave(self)
        super().connection_lost(exc)

    def drop(self) -> None:
        """End it at once, without a word."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Something has come; pings among it are answered at once, whether or not the answers are taken."""
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            metrics.SLOW.labels("pongs").inc()
            self.transport.abort()


def waiting_at(doorstep: Doorstep) -> type[NodeConnection]:
    """Connections that wait at this doorstep."""
    return type("WaitingConnection", (NodeConnection,), {"doorstep": doorstep})


class NodeSocket:
    """What a session reads from and writes to.

    Args:
        connection: Already open.
        patience_s: How long a node may take for a message to it, for one from it once it has begun, and for the answer
            to a ping; then it is closed.
    """

    def __init__(self, connection: ServerConnection, patience_s: float) -> None:
        self._connection = connection
        self._patience_s = patience_s
        self._turn = asyncio.Lock()

    async def receive(self) -> Envelope | bytes:
        """The next message, or binary frame.

        Raises:
            Ended: the node hung up, or did not go on with what it began.
            InvalidArgumentError: a text that is no message of the protocol.
        """
        data = await self._message()
        if isinstance(data, bytes):
            metrics.NODE_BYTES.labels("received", "binary").inc(len(data))
            return data
        metrics.NODE_BYTES.labels("received", "text").inc(len(data))
        if len(data) > MAX_TEXT_BYTES:
            raise InvalidArgumentError(f"a message of {len(data)} characters; allowed: {MAX_TEXT_BYTES}")
        return TenzroProtocol.decode(data)

    async def send(self, message: m.ToNode, ref: int | None = None) -> None:
        """Send a message; returns when there is room for the next.

        Raises:
            Ended: the node is gone, or does not read.
        """
        text = TenzroProtocol.encode(Envelope(message, ref=ref))
        metrics.NODE_BYTES.labels("sent", "text").inc(len(text))
        await self._send(text)

    async def send_frame(self, frame: bytes) -> None:
        """Send a binary frame; returns when there is room for the next.

        Raises:
            Ended: the node is gone, or does not read.
        """
        metrics.NODE_BYTES.labels("sent", "binary").inc(len(frame))
        await self._send(frame)

    async def refuse(self, ref: int | None, error: CortexError) -> None:
        """Tell that what `ref` asked for was not done."""
        await self.send(error_message(error, status_of(error).name), ref)

    async def keep_alive(self, clock: Clock) -> None:
        """Ping the node for as long as it answers. In the middle of a frame it cannot: so no frame may take for ever.

        Raises:
            Ended: the node is gone, or does not answer.
        """
        while True:
            await clock.sleep(min(PING_EVERY_S, self._patience_s))
            answer = await self._soon(self._connection.ping(), "the node took nothing")
            await self._soon(answer, "no answer to a ping")

    async def close(self, ending: Ended | CortexError) -> None:
        """Say why, and close; without a word to a node that takes none."""
        code = ending.code if isinstance(ending, Ended) else close_code_of(ending)
        metrics.NODE_CLOSES.labels(str(code.value)).inc()
        reason = str(ending).encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        try:
            async with asyncio.timeout(CLOSE_S):
                if isinstance(ending, CortexError):
                    with contextlib.suppress(Ended):
                        await self.refuse(None, ending)
                await self._connection.close(code, reason)
        except TimeoutError:
            self._connection.transport.abort()

    async def _message(self) -> str | bytes:
        """The next message, put together from its fragments."""
        loop, pieces = asyncio.get_running_loop(), list[str | bytes]()
        try:
            async with asyncio.timeout(None) as limit:
                async for piece in self._connection.recv_streaming():
                    if not pieces:
                        limit.reschedule(loop.time() + self._patience_s)
                    pieces.append(piece)
                    if len(pieces) > MAX_FRAGMENTS:
                        raise InvalidArgumentError(f"a message in more than {MAX_FRAGMENTS} fragments")
        except ConnectionClosed:
            raise Ended from None
        except TimeoutError:
            raise Ended(Close.TOO_SLOW, f"a message was not here {self._patience_s:g} s after it began") from None
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    async def _send(self, data: str | bytes) -> None:
        """Send when it is its turn: one message at a time waits for the node."""
        async with self._turn:
            await self._soon(self._connection.send(data), "the node took nothing")

    async def _soon(self, awaited: Awaitable[T], otherwise: str) -> T:
        try:
            async with asyncio.timeout(self._patience_s):
                return await awaited
        except ConnectionClosed:
            raise Ended from None
        except TimeoutError:
            raise Ended(Close.TOO_SLOW, f"{otherwise} for {self._patience_s:g} s") from None


def _joined(pieces: list[str | bytes]) -> str | bytes:
    if isinstance(pieces[0], str):
        return "".join(cast("list[str]", pieces))
    return b"".join(cast("list[bytes]", pieces))
