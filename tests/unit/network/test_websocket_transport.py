"""Requests over a gateway's line."""

from __future__ import annotations

import asyncio
import gc

from cortex_common.errors import UnavailableError
from cortex_common.network import websocket_transport
from cortex_common.network.messages import Hello, JobStatusRequest
from cortex_common.network.websocket_link import GatewayAccess
from cortex_common.network.websocket_transport import WebSocketTransport
from cortex_common.security.node_tokens import NodeToken


class BreakingLink:
    """Breaks while something is being sent."""

    def __init__(self, message: str) -> None:
        self.sending, self._broke, self._message = asyncio.Event(), asyncio.Event(), message

    def next_id(self) -> int:
        return 1

    async def run(self) -> Exception:
        await self.sending.wait()
        return UnavailableError(self._message)

    async def send(self, *_: object) -> None:
        self.sending.set()
        await self._broke.wait()
        raise UnavailableError(self._message)

    async def close(self) -> None:
        self._broke.set()


def test_a_line_that_breaks_under_a_request_tells_its_sender_and_nobody_else(monkeypatch):
    link, said = BreakingLink("cut"), []

    async def opened(*_, **__):
        return link

    async def scene() -> list[str]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
        access = GatewayAccess("ws://nowhere", NodeToken.fresh(), Hello("w", "eu", "i", 1), "")
        transport = WebSocketTransport(access)
        asking = transport.ask(JobStatusRequest("j1"), timeout_s=5, waits=True)
        refusals = await asyncio.gather(transport.listen(lambda _: None), asking, return_exceptions=True)
        return [error.message for error in refusals]

    monkeypatch.setattr(websocket_transport, "open_link", opened)
    assert asyncio.run(scene()) == ["cut", "cut"]
    # Whatever was not told to anybody is said when it goes.
    gc.collect()
    assert said == []
