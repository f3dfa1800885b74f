"""How long the HTTP listener bears somebody who sends or takes too slowly (slow-loris and its kin)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cortex_common.logging import get_logger
from services.gateway import metrics

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of a connection.

    Attributes:
        head_s: From its first byte (or the connection's start) until a request's headers are here.
        body_s: From then until its body is.
        write_s: How long the peer may take nothing of an answer that waits for it.
    """

    head_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 30.0


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose connections end when the peer makes no headway."""

    patience = Patience()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection begins."""
        super().connection_made(transport)
        self._waiting: tuple[str, asyncio.TimerHandle] | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._expect("head", self.patience.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """A connection has ended."""
        self._expect_nothing()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.IDLE:
            self._expect("head", self.patience.head_s)
        elif state is h11.SEND_BODY:
            self._expect("body", self.patience.body_s)
        else:
            self._expect_nothing()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection becomes a WebSocket, with limits of its own."""
        self._expect_nothing()
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        """The peer takes nothing now."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.patience.write_s, self._give_up, "answer")

    def resume_writing(self) -> None:
        """The peer goes on."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def _expect(self, what: str, within_s: float) -> None:
        """Give up unless `what` is here in time; bytes that come meanwhile win no time."""
        if self._waiting is not None and self._waiting[0] == what:
            return
        self._expect_nothing()
        self._waiting = (what, self.loop.call_later(within_s, self._give_up, what))

    def _expect_nothing(self) -> None:
        if self._waiting is not None:
            self._waiting[1].cancel()
            self._waiting = None

    def _give_up(self, what: str) -> None:
        metrics.SLOW.labels(what).inc()
        log.info("slow_connection_closed", peer=self.client and self.client[0], waited_for=what)
        self.transport.abort()


def patient(limits: Patience) -> type[PatientProtocol]:
    """The protocol with these limits."""
    return type("LimitedProtocol", (PatientProtocol,), {"patience": limits})
