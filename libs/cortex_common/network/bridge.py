"""TenzroBridge: a node's connection to its network, kept up, with its messages routed to whoever handles them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc.aio
from tenacity import AsyncRetrying, RetryCallState

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, UnavailableError
from cortex_common.logging import get_logger
from cortex_common.network import messages as m
from cortex_common.network.heartbeat import Announcer, NodeReport, announce_forever

_log = get_logger(__name__)
_M = TypeVar("_M")

URGENT_TIMEOUT_S = 30.0
_ACTIVITY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Connected:
    """Not on the wire: a line is open."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """Not on the wire: the line broke, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    """How to go on when the network is away.

    Attributes:
        attempts: Give up after so many failures in a row; None: never.
        fatal: Errors that another attempt cannot mend.
        first_wait_s: Before the second attempt; doubles from one to the next, and is spread by half: nodes must not
            come back all at once.
        longest_wait_s: The limit of that.
    """

    attempts: int | None = None
    fatal: tuple[type[CortexError], ...] = ()
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0

    def wait_s(self, failures: int) -> float:
        """Before the next attempt, after this many failures in a row."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failures, 10))
        return random.uniform(longest / 2, longest)  # noqa: S311  spreads load, guards nothing


class Transport(Protocol):
    """One way to reach the network: gRPC or WebSocket. `what` names the peer for people."""

    what: str

    async def listen(self, deliver: Callable[[m.ToNode], None]) -> None:
        """Open a line and hand over what comes, until the peer closes it.

        Raises:
            CortexError: it could not be opened, or broke.
        """

    async def ask(self, message: m.FromNode, *, timeout_s: float, waits: bool) -> m.ToNode:
        """Send a request and return its answer; `waits`: also for a line, while there is none.

        Raises:
            CortexError: what the peer answered instead, or UnavailableError.
        """

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """Where to exchange weights with an aggregator, by address and name: for `push_update` and `pull_model`."""

    def announcer(self) -> Announcer:
        """Takes the node's heartbeats."""

    async def close(self) -> None:
        """Hang up."""


class TenzroBridge:
    """A node's connection to its network, over either transport; what the worker service and CortexManager stand on.

    `run` keeps the line up; what arrives goes to the handlers of its type, in order. Requests may be made at any time.

    >>> import asyncio
    >>> from cortex import TenzroBridge
    >>> from cortex_common.clock import SystemClock
    >>> from cortex_common.network.bridge import Connected
    >>> from cortex_common.network.grpc_transport import GrpcTransport
    >>> from cortex_common.network.messages import Assignments, Hello
    >>> hello = Hello("gpu-7", "eu", "one", 1)
    >>> transport = GrpcTransport(hello, peers, tls, SystemClock(), sealing.public)  # or a WebSocketTransport
    >>> bridge = TenzroBridge(transport, SystemClock())
    >>> bridge.on(Connected, lambda _: print("connected to", bridge.what.partition(" at ")[0]))
    >>> work = asyncio.Event()
    >>> bridge.on(Assignments, lambda message: work.set())
    >>> line = asyncio.create_task(bridge.run())
    >>> _ = await work.wait()
    connected to coordinator
    >>> bridge.is_open
    True
    >>> await bridge.close()
    >>> _ = line.cancel()

    `bridge.report` tells how work ended; `push_update` and `pull_model` exchange weights over
    `bridge.to(assignment.aggregator_address, assignment.aggregator)`.
    """

    def __init__(self, transport: Transport, clock: Clock, policy: ReconnectPolicy | None = None) -> None:
        self._transport = transport
        self._clock = clock
        self._policy = policy or ReconnectPolicy()
        self._handlers: dict[type[Any], list[Callable[[Any], None]]] = {}
        self._failures = 0
        self._reason = ""
        self._opened = asyncio.Event()

    @property
    def what(self) -> str:
        """The peer, for people."""
        return self._transport.what

    @property
    def is_open(self) -> bool:
        """Whether there is a line now."""
        return self._opened.is_set()

    async def opened(self) -> None:
        """Return as soon as there is a line."""
        await self._opened.wait()

    def on(self, kind: type[_M], handler: Callable[[_M], None]) -> None:
        """Have every message of this class handed to `handler`, on the event loop, in the order of arrival.

        Args:
            kind: A message to the node, or Connected or Disconnected.
            handler: Must return at once; what takes time belongs in a task.
        """
        self._handlers.setdefault(kind, []).append(handler)

    async def run(self) -> None:
        """Keep a line open until cancelled, opening it again whenever it breaks.

        Raises:
            CortexError: a fatal one, or the last one when the policy's attempts are used up.
        """
        retrying = AsyncRetrying(
            retry=self._is_worth_another,
            wait=lambda _: self._policy.wait_s(self._failures),
            stop=lambda _: self._policy.attempts is not None and self._failures >= self._policy.attempts,
            sleep=self._clock.sleep,
            reraise=True,
        )
        await retrying(self._line)

    async def report(self, report: m.TrainingMetrics | m.WorkResult, *, is_urgent: bool) -> bool:
        """Deliver a report; False when its assignment is no longer wanted.

        Args:
            report: What is being done, or how it ended.
            is_urgent: Wait for the connection rather than fail while there is none.

        Raises:
            CortexError: not delivered; UnavailableError when it is worth another try.
        """
        timeout_s = URGENT_TIMEOUT_S if is_urgent else _ACTIVITY_TIMEOUT_S
        answer = await self._transport.ask(report, timeout_s=timeout_s, waits=is_urgent)
        return isinstance(answer, m.ReportAck) and answer.wanted

    async def ask(self, message: m.FromNode, timeout_s: float = URGENT_TIMEOUT_S) -> m.ToNode:
        """Send any other request; its answer.

        Raises:
            CortexError: what the peer answered instead, or UnavailableError.
        """
        return await self._transport.ask(message, timeout_s=timeout_s, waits=True)

    async def announce_forever(self, node: Callable[[], NodeReport], stop: asyncio.Event) -> None:
        """Send heartbeats until `stop` is set, then leave."""
        await announce_forever(self._transport.announcer(), node, self._clock, stop)

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """Where to exchange weights with an aggregator, by address and name: for `push_update` and `pull_model`."""
        return self._transport.to(address, aggregator)

    async def close(self) -> None:
        """Hang up."""
        await self._transport.close()

    async def _line(self) -> None:
        """One line, until it breaks; always ends with the reason as an error."""
        try:
            await self._transport.listen(self._deliver)
            raise UnavailableError(f"{self.what} closed the line")
        except CortexError as error:
            self._failures = 0 if self.is_open else self._failures + 1
            if error.message != self._reason:
                self._reason = error.message
                _log.warning("network_away", reason=error.message)
            raise
        finally:
            was_open = self.is_open
            self._opened.clear()
            if was_open:
                self._route(Disconnected(self._reason))

    def _deliver(self, message: m.ToNode) -> None:
        if not self.is_open:
            self._opened.set()
            self._reason = ""
            _log.info("network_reached", peer=self.what)
            self._route(Connected())
        self._route(message)

    def _route(self, message: object) -> None:
        for handler in self._handlers.get(type(message), ()):
            handler(message)

    def _is_worth_another(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return isinstance(error, CortexError) and not isinstance(error, self._policy.fatal)
