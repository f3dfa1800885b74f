"""A node's connection, from its JOIN to its end: control messages both ways, weights passed through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cortex_common.clock import Clock
from cortex_common.errors import (
    ConflictError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId, NodeName
from cortex_common.logging import get_logger
from cortex_common.network import messages as m
from cortex_common.network.close_codes import Close
from cortex_common.network.protocol import MAX_TEXT_BYTES, Envelope, TenzroProtocol, type_of
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.server import MAX_MESSAGE_BYTES
from cortex_common.security.certificates import Certificate
from cortex_common.security.passes import serial_of
from services.gateway import metrics
from services.gateway.following import unbroken
from services.gateway.relay import NodePeers, NodeRelay
from services.gateway.websocket.board import StatusBoard
from services.gateway.websocket.socket import Ended, NodeSocket
from services.gateway.websocket.transfers import WINDOW, Addresses, Upload, send_version

log = get_logger(__name__)

LINE_PATIENCE_S = 30.0
READMISSION_S = 25.0
"""Time to answer a later CHALLENGE, which waits behind what the node is sent, as its answer does behind what it sends.

Discovery takes it for 30 s.
"""
MAX_REQUESTS = 16
"""Requests of a connection that may be under way; more wait, and hold the node back."""
MAX_TRANSFERS = 4
"""Of a connection: one up, one down, and those that have just ended."""


def connections_of(slots: int) -> int:
    """How many a node may have: one that attends and two for each job it trains at a time, and as many that were cut.

    Those that were cut are there until they have not answered a ping.
    """
    return 2 * (1 + 2 * slots)


@dataclass(frozen=True, slots=True)
class Gate:
    """What all sessions share.

    Attributes:
        network: Its name.
        denied: Who is shut out.
        join_s: Time to answer a CHALLENGE.
        attending: The session that each node attends by.
        sessions: All of each node, the oldest first.
    """

    network: str
    peers: NodePeers
    board: StatusBoard
    denied: DenyList
    clock: Clock
    join_s: float = 10.0
    addresses: Addresses = field(default_factory=Addresses)
    attending: dict[str, Session] = field(default_factory=dict)
    sessions: dict[str, dict[Session, None]] = field(default_factory=dict)


async def serve_node(socket: NodeSocket, gate: Gate, let_in: Callable[[], None]) -> None:
    """Serve a connection until it ends, and close it with the reason.

    Args:
        socket: Of the node.
        gate: What all sessions share.
        let_in: Called whenever the network has let the node in; raises UnavailableError if there is no room here.
    """
    try:
        session = await _admitted(socket, gate, let_in)
        ending: Ended | CortexError = await session.run()
    except (Ended, CortexError) as error:
        ending = error
    if isinstance(ending, CortexError):
        log.info("node_refused", reason=ending.message)
    await socket.close(ending)


async def _admitted(socket: NodeSocket, gate: Gate, let_in: Callable[[], None]) -> Session:
    """The session of a node that has answered its challenge."""
    challenge = await _challenge(socket, gate)
    try:
        async with asyncio.timeout(gate.join_s):
            first = await socket.receive()
    except TimeoutError:
        raise Ended(Close.TOO_SLOW, f"no JOIN within {gate.join_s:g} s") from None
    if not isinstance(first, Envelope) or not isinstance(first.message, m.Join):
        raise InvalidArgumentError("the first message of a node is JOIN, in answer to the CHALLENGE")
    session = Session(socket, gate, first.message, let_in)
    await session.admit(first, challenge)
    return session


async def _challenge(socket: NodeSocket, gate: Gate) -> str:
    challenge = (await gate.peers.challenge()).hex()
    await socket.send(m.Challenge(TenzroProtocol.VERSIONS, gate.network, challenge))
    return challenge


class Session:
    """A node that has joined."""

    def __init__(self, socket: NodeSocket, gate: Gate, join: m.Join, let_in: Callable[[], None]) -> None:
        self._let_in = let_in
        self._socket = socket
        self._gate = gate
        self._join = join
        self._relay: NodeRelay
        self._admitted_s = 0.0
        self._challenge = ""
        self._answered = asyncio.Event()
        self._ended: asyncio.Future[Ended | CortexError] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._line: asyncio.Task[None] | None = None
        self._upload: Upload | None = None
        self._had_upload = False
        self._transfers: dict[int, asyncio.Task[None]] = {}
        self._watched: dict[JobId, asyncio.Task[None]] = {}

    async def admit(self, envelope: Envelope, challenge: str) -> None:
        """Have the network let the node in, or stay in.

        Raises:
            PreconditionError: another version of the protocol.
            UnauthenticatedError, ForbiddenError: it does not.
            UnavailableError: there is no room.
        """
        join = envelope.message
        assert isinstance(join, m.Join)  # noqa: S101 - by the caller
        if join.version not in TenzroProtocol.VERSIONS:
            known = ", ".join(map(str, TenzroProtocol.VERSIONS))
            raise PreconditionError(f"protocol version {join.version} given; allowed: {known}")
        if (join.hello, join.sealing_key) != (self._join.hello, self._join.sealing_key):
            raise ForbiddenError(f"this connection is that of node {self._join.hello.node!r}, as it joined")
        if not challenge or join.challenge != challenge:
            raise UnauthenticatedError("JOIN answers another challenge than the one of this connection")
        self._relay, self._admitted_s = await self._gate.peers.admit(join)
        self._let_in()
        self._challenge = ""
        self._answered.set()
        welcome = m.Welcome(
            join.version,
            self._gate.network,
            join.hello.node,
            WINDOW,
            MAX_MESSAGE_BYTES,
            MAX_TEXT_BYTES,
            round(self._admitted_s, 1),
        )
        await self._socket.send(welcome, envelope.id)

    async def run(self) -> Ended | CortexError:
        """Serve until something ends the connection; what."""
        node = self._join.hello.node
        log.info("node_joined", node=node, region=self._join.hello.region, attends=self._join.attends)
        with self._counted():
            async with self._attending(), self._while_member():
                self._begin(self._read())
                self._begin(self._stay_admitted())
                self._begin(self._socket.keep_alive(self._gate.clock))
                try:
                    ending = await self._ended
                finally:
                    for task in self._tasks:
                        task.cancel()
                    if self._tasks:
                        await asyncio.wait(self._tasks)
        log.info("node_gone", node=node, attends=self._join.attends, reason=str(ending) or "hung up")
        return ending

    def end(self, ending: Ended | CortexError) -> None:
        """End the connection; what ends it first counts."""
        if not self._ended.done():
            self._ended.set_result(ending)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Have the oldest of the node's connections make room, if it has more than it can need."""
        node, sessions, slots = self._join.hello.node, self._gate.sessions, self._join.hello.slots
        own = sessions.setdefault(node, {})
        own[self] = None
        while len(own) > (allowed := connections_of(slots)):
            oldest = next((each for each in own if not each._join.attends), next(iter(own)))
            del own[oldest]
            oldest.end(UnavailableError(f"node {node!r} has more than {allowed} connections: the oldest goes"))
        try:
            yield
        finally:
            own.pop(self, None)
            if not own and sessions.get(node) is own:
                del sessions[node]

    @asynccontextmanager
    async def _attending(self) -> AsyncIterator[None]:
        """Take the place of the node's earlier connection, if this one attends."""
        metrics.NODES.labels(str(self._join.attends).lower()).inc()
        node, attending = self._join.hello.node, self._gate.attending
        if self._join.attends:
            if earlier := attending.get(node):
                earlier.end(ConflictError(f"a newer connection of node {node!r} took this one's place"))
            attending[node] = self
            self._attend()
        try:
            yield
        finally:
            metrics.NODES.labels(str(self._join.attends).lower()).dec()
            if attending.get(node) is self:
                del attending[node]

    @asynccontextmanager
    async def _while_member(self) -> AsyncIterator[None]:
        """Cut the node off as soon as it is shut out."""
        identity = Identity(self._gate.network, Role.WORKER, NodeName(self._join.hello.node))
        always = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
        standing = Certificate(identity, *always, serial_of(self._join.token_id))
        shut_out = UnauthenticatedError(f"node {identity.name!r} was revoked", "revoked")
        with self._gate.denied.cutting(standing, lambda: self.end(shut_out)):
            yield

    # --- what goes on by itself

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it beside the rest; what goes wrong with it ends the connection."""

        async def guarded() -> None:
            try:
                await work
            except (Ended, CortexError) as error:
                self.end(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session_failed", error=f"{type(error).__name__}: {error}", exc_info=error)
            self.end(Ended(Close.INTERNAL, "internal error"))

    async def _stay_admitted(self) -> None:
        """Ask the node for its proof again, at half of the time it is admitted for, again and again."""
        while True:
            await self._gate.clock.sleep(self._admitted_s / 2)
            self._answered.clear()
            self._challenge = await _challenge(self._socket, self._gate)
            within_s = min(READMISSION_S, self._admitted_s / 4)
            try:
                async with asyncio.timeout(within_s):
                    await self._answered.wait()
            except TimeoutError:
                # Slow, not a stranger: what it transfers goes on where it was, once it has come again.
                raise Ended(Close.TOO_SLOW, f"the CHALLENGE was not answered within {within_s:g} s") from None

    def _attend(self) -> None:
        """Open the node's line to the coordinator, or open it anew with a new pass; the older one ends by itself."""
        self._line = self._begin(self._follow(is_renewal=self._line is not None))

    async def _follow(self, *, is_renewal: bool) -> None:
        """Hand out what is wanted; through every break of the line that does not last."""
        me = asyncio.current_task()
        try:
            async with aclosing(unbroken(self._relay.attend, self._gate.clock, LINE_PATIENCE_S)) as line:
                async for message in line:
                    if self._line is not me:
                        return
                    await self._hand_out(replace(message, is_first=message.is_first and not is_renewal))
                    is_renewal = False
        except UnauthenticatedError as error:
            if self._line is me:
                raise _ask_again(error) from error
            return
        except CortexError:
            if self._line is me:
                raise
        if self._line is me:
            raise UnavailableError("the coordinator closed the node's line")

    async def _hand_out(self, message: m.Assignments) -> None:
        for each in message.assignments:
            self._gate.addresses.learn(self._join.hello.node, each)
        await self._socket.send(message)
        self._watch({each.job_id for each in message.assignments})

    def _watch(self, jobs: set[JobId]) -> None:
        for job in set(self._watched) - jobs:
            self._watched.pop(job).cancel()
        for job in jobs:
            if job not in self._watched or self._watched[job].done():
                self._watched[job] = self._begin(self._tell_status(job))

    async def _tell_status(self, job: JobId) -> None:
        async for status in self._gate.board.follow(job):
            await self._socket.send(m.JobStatusMessage(status))

    # --- what the node sends

    async def _read(self) -> None:
        while True:
            received = await self._socket.receive()
            if isinstance(received, bytes):
                self._take_frame(received)
            else:
                await self._take(received)

    def _take_frame(self, frame: bytes) -> None:
        if self._upload is not None:
            self._upload.take(frame)
        elif not self._had_upload:
            raise InvalidArgumentError("a binary frame without a WEIGHTS_UPDATE before it")
        # Else they were on their way when their upload ended: nobody wants them.

    async def _take(self, envelope: Envelope) -> None:
        message, number = envelope.message, envelope.id
        match message:
            case m.Leave():
                await self._relay.leave()
                raise Ended
            case m.Join():
                await self.admit(envelope, self._challenge)
                if self._line is not None:
                    self._attend()
            case m.Cancel():
                self._cancel(envelope.ref)
            case _ if number is None:
                raise InvalidArgumentError(f"{type_of(type(message))}: id is missing; the answer refers to it")
            case m.WeightsUpdate():
                self._begin_upload(number)
            case m.ModelPull():
                self._transfer(number, send_version(message, self._relay, self._gate.addresses, self._socket))
            case m.Heartbeat() | m.TrainingMetrics() | m.WorkResult() | m.JobStatusRequest():
                await self._room.acquire()
                self._begin(self._answer(message, number))
            case _:
                raise InvalidArgumentError(f"{type_of(type(message))} is not for a node to send")

    async def _answer(
        self, message: m.Heartbeat | m.TrainingMetrics | m.WorkResult | m.JobStatusRequest, number: int
    ) -> None:
        try:
            answer = await self._asked(message)
        except UnauthenticatedError as error:
            raise _ask_again(error) from error
        except CortexError as error:
            await self._socket.refuse(number, error)
        else:
            await self._socket.send(answer, number)
        finally:
            self._room.release()

    async def _asked(self, message: m.Heartbeat | m.TrainingMetrics | m.WorkResult | m.JobStatusRequest) -> m.ToNode:
        match message:
            case m.Heartbeat():
                return m.HeartbeatAck(await self._relay.beat(message))
            case m.JobStatusRequest():
                self._gate.addresses.of(self._join.hello.node, message.job_id)
                return m.JobStatusMessage(await self._gate.board.status(JobId(message.job_id)))
            case _:
                return m.ReportAck(await self._relay.report(message))

    def _begin_upload(self, number: int) -> None:
        if self._upload is not None:
            raise InvalidArgumentError("a WEIGHTS_UPDATE while another one is under way on this connection")
        upload = Upload(number, self._socket)
        self._upload, self._had_upload = upload, True

        async def run() -> None:
            try:
                await upload.run(self._relay, self._gate.addresses)
            finally:
                self._upload = None

        self._transfer(number, run())

    def _transfer(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        """Do it beside the rest, until it is done, refused or cancelled by the node."""
        if number in self._transfers:
            work.close()
            raise InvalidArgumentError(f"id: {number} given; a transfer of this id is under way")
        if len(self._transfers) >= MAX_TRANSFERS:
            work.close()
            raise InvalidArgumentError(f"more than {MAX_TRANSFERS} transfers under way on this connection")

        async def told() -> None:
            try:
                await work
            except UnauthenticatedError as error:
                # The pass ran out in the middle: with the next one, the transfer goes on where it was.
                await self._socket.refuse(number, UnavailableError(error.message))
            except CortexError as error:
                await self._socket.refuse(number, error)

        task = self._transfers[number] = self._begin(told())
        task.add_done_callback(lambda _: self._transfers.pop(number, None))

    def _cancel(self, ref: int | None) -> None:
        task = self._transfers.get(ref) if ref is not None else None
        if ref is not None and task is not None:
            task.cancel()
            self._begin(self._cancelled(ref, task))

    async def _cancelled(self, ref: int, task: asyncio.Task[None]) -> None:
        await asyncio.wait((task,))
        await self._socket.send(m.ErrorMessage("CANCELLED", "cancelled by the node"), ref)


def _ask_again(error: UnauthenticatedError) -> UnavailableError:
    """A call for the node that was refused: for its pass, or for this gateway's own certificate, nobody can tell here.

    Whether the node's token is good, discovery says when it joins again.
    """
    return UnavailableError(f"join again: {error.message}")
