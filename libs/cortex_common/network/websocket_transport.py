"""The network over WebSocket: for nodes that can only open an outgoing HTTP(S) connection to a gateway.

A node needs a node token (`cortex node token --gateway`) and no certificate. docs/websocket.md tells the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio

from cortex_common.errors import CortexError, UnavailableError
from cortex_common.network import messages as m
from cortex_common.network.heartbeat import Announcer, NodeReport
from cortex_common.network.websocket_link import GatewayAccess, Link, Received, error_of, open_link
from cortex_common.network.websocket_weights import WeightsChannel


class WebSocketTransport:
    """Line, reports and heartbeats over one connection; weights over others.

    ```python
    hello = Hello("lab-3", "eu", uuid.uuid4().hex)
    access = GatewayAccess("wss://gateway.example.org:8765", NodeToken.decode(text), hello, sealing_key)
    bridge = TenzroBridge(WebSocketTransport(access), clock)
    ```
    """

    def __init__(self, access: GatewayAccess) -> None:
        """Prepare; nothing is dialled yet."""
        self.what = f"gateway at {access.url}"
        self._access = access
        self._link: Link | None = None
        self._opened = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[m.ToNode]] = {}
        self._weights = WeightsChannel(access)

    async def listen(self, deliver: Callable[[m.ToNode], None]) -> None:
        """Connect, join, and hand over what comes, until the connection ends.

        Raises:
            CortexError: why it ended, or could not be opened.
        """
        link = await open_link(self._access, attends=True)

        async def received(what: Received) -> None:
            if not isinstance(what, bytes):
                self._route(what.message, what.ref, deliver)

        link.on_received = received
        self._link = link
        self._opened.set()
        try:
            raise await link.run()
        finally:
            self._link = None
            self._opened.clear()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(UnavailableError(f"the line to the {self.what} broke"))
            await link.close()

    async def ask(self, message: m.FromNode, *, timeout_s: float, waits: bool) -> m.ToNode:
        """Send a request and return its answer."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._asked(message, waits=waits)
        except TimeoutError:
            raise UnavailableError(f"the {self.what} did not answer in time") from None

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """Weights go through the gateway, which knows the aggregator of each assignment."""
        return self._weights.as_channel()

    def announcer(self) -> Announcer:
        """Heartbeats go through the gateway."""
        return _GatewayAnnouncer(self)

    async def leave(self) -> None:
        """Tell that the node goes."""
        if self._link is not None:
            await self._link.send(m.Leave())

    async def close(self) -> None:
        """Hang up."""
        await self._weights.close()

    async def _asked(self, message: m.FromNode, *, waits: bool) -> m.ToNode:
        if waits:
            await self._opened.wait()
        link = self._link
        if link is None:
            raise UnavailableError(f"there is no line to the {self.what}")
        number = link.next_id()
        answer: asyncio.Future[m.ToNode] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await link.send(message, number)
            return await answer
        finally:
            del self._waiting[number]
            if answer.done() and not answer.cancelled():
                # The line broke while the request was still being sent: its sender has been told already.
                answer.exception()

    def _route(self, message: m.Message, ref: int | None, deliver: Callable[[m.ToNode], None]) -> None:
        if ref is None:
            if isinstance(message, m.Assignments | m.JobStatusMessage):
                deliver(message)
            return
        answer = self._waiting.get(ref)
        if answer is None or answer.done():
            return
        if isinstance(message, m.ErrorMessage):
            answer.set_exception(error_of(message))
        elif isinstance(message, m.HeartbeatAck | m.ReportAck | m.JobStatusMessage):
            answer.set_result(message)


class _GatewayAnnouncer:
    """Heartbeats as messages."""

    _TIMEOUT_S = 5.0

    def __init__(self, transport: WebSocketTransport) -> None:
        self.what = transport.what
        self._transport = transport

    async def beat(self, node: NodeReport) -> float:
        """Renew the node's lease."""
        datasets = tuple(
            m.DatasetFacts(each.name, tuple(each.input_shape), each.classes, each.examples) for each in node.datasets
        )
        beat = m.Heartbeat(node.resources, datasets, node.activity, node.version, node.started_s)
        answer = await self._transport.ask(beat, timeout_s=self._TIMEOUT_S, waits=True)
        if not isinstance(answer, m.HeartbeatAck):
            raise CortexError(f"the {self.what} answered a heartbeat with {type(answer).__name__}")
        return answer.heartbeat_s

    async def leave(self, node: NodeReport) -> None:
        """End the node's lease."""
        await self._transport.leave()

    async def close(self) -> None:
        """The connection is the line's."""
