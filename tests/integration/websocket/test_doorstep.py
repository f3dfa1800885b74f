"""Connections that never join: bounded in number, and no obstacle to nodes that do."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.gateway.websocket.doorstep import Doorstep
from tests.integration.websocket.conftest import TlsOf, gate_of
from tests.integration.worker.gateways import node_network
from tests.waiting import eventually

ROOM = 5


@dataclass(eq=False)
class Caller:
    is_there: bool = True

    def drop(self) -> None:
        self.is_there = False


def test_the_address_with_most_loses_its_oldest() -> None:
    doorstep = Doorstep(3)
    first, *flood = [Caller() for _ in range(6)]
    doorstep.arrive(first, "192.0.2.1")
    for each in flood:
        doorstep.arrive(each, "192.0.2.2")
    assert [each.is_there for each in (first, *flood)] == [True, False, False, False, True, True]
    assert len(doorstep) == 3


def test_who_was_let_in_or_has_gone_makes_room() -> None:
    doorstep = Doorstep(2)
    callers = [Caller() for _ in range(9)]
    for each in callers:
        doorstep.arrive(each, "192.0.2.1")
        doorstep.leave(each)
        doorstep.leave(each)
    assert all(each.is_there for each in callers)
    assert len(doorstep) == 0


class Silent:
    """A TCP connection on which nothing is ever said, not even a request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._end = asyncio.ensure_future(reader.read())
        self._writer = writer

    @property
    def is_held(self) -> bool:
        return not self._end.done()

    def close(self) -> None:
        self._writer.close()
        self._end.cancel()


async def test_a_flood_that_never_joins_keeps_no_node_out(tls_of: TlsOf, tmp_path) -> None:
    patience = {"node_join_s": 600.0, "head_s": 600.0}
    async with (
        node_network(tls_of, tmp_path) as nodes,
        gate_of(nodes, max_joining=ROOM, max_node_connections=2, **patience) as gate,
        AsyncExitStack() as stack,
    ):
        port = int(gate.url.rpartition(":")[2])
        # Nodes elsewhere, one not quick to join, and one that has joined.
        slow = await stack.enter_async_context(gate.raw(local_addr=("127.0.0.2", 0)))
        await stack.enter_async_context(gate.raw("ws1"))
        flood = []
        for _ in range(4 * ROOM):
            flood.append(Silent(*await asyncio.open_connection("127.0.0.1", port)))
            stack.callback(flood[-1].close)
        never_joining = [await stack.enter_async_context(gate.raw()) for _ in range(2 * ROOM)]
        await eventually(lambda: sum(each.is_held for each in flood) == 0)
        opened = [each.connection for each in never_joining]
        await eventually(lambda: sum(each.close_code is None for each in opened) == ROOM - 1)
        # The newest stay. Neither they nor the flood took the place of a node.
        assert [each.close_code is None for each in opened[-ROOM + 1 :]] == (ROOM - 1) * [True]
        await slow.join(await gate.access("ws2"))
        assert slow.connection.close_code is None
