"""One WebSocket as messages and frames, bounded in both directions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from cortex_common.errors import CortexError, InvalidArgumentError
from cortex_common.network import messages as m
from cortex_common.network.close_codes import Close, close_code_of
from cortex_common.network.protocol import MAX_TEXT_BYTES, Envelope, TenzroProtocol, error_message
from cortex_common.rpc.errors import status_of
from services.gateway import metrics

_MAX_REASON_BYTES = 123


class Ended(Exception):  # noqa: N818 - mostly it is none
    """The connection is over, by the node or by us; `code` is what we close it with."""

    def __init__(self, code: Close = Close.DONE, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class NodeSocket:
    """What a session reads from and writes to.

    Args:
        connection: Already open.
        patience_s: A node that does not take a message for so long is closed.
    """

    def __init__(self, connection: ServerConnection, patience_s: float) -> None:
        self._connection = connection
        self._patience_s = patience_s

    async def receive(self) -> Envelope | bytes:
        """The next message, or binary frame.

        Raises:
            Ended: the node hung up.
            InvalidArgumentError: a text that is no message of the protocol.
        """
        try:
            data = await self._connection.recv()
        except ConnectionClosed:
            raise Ended from None
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
        await self._soon(self._connection.send(text))

    async def send_frame(self, frame: bytes) -> None:
        """Send a binary frame; returns when there is room for the next.

        Raises:
            Ended: the node is gone, or does not read.
        """
        metrics.NODE_BYTES.labels("sent", "binary").inc(len(frame))
        await self._soon(self._connection.send(frame))

    async def refuse(self, ref: int | None, error: CortexError) -> None:
        """Tell that what `ref` asked for was not done."""
        await self.send(error_message(error, status_of(error).name), ref)

    async def close(self, ending: Ended | CortexError) -> None:
        """Say why, and close."""
        code = ending.code if isinstance(ending, Ended) else close_code_of(ending)
        metrics.NODE_CLOSES.labels(str(code.value)).inc()
        reason = str(ending)
        if isinstance(ending, CortexError):
            with contextlib.suppress(Ended):
                await self.refuse(None, ending)
        await self._connection.close(code, reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore"))

    async def _soon(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await sending
        except ConnectionClosed:
            raise Ended from None
        except TimeoutError:
            raise Ended(Close.TOO_SLOW, f"the node took nothing for {self._patience_s:g} s") from None
