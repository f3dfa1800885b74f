"""Weights over WebSocket, in the form of the RPCs they are elsewhere: `push_update` and `pull_model` see no difference.

Each transfer has a connection to itself while it lasts, so that heartbeats and orders never wait behind one. As many
are kept open as were needed at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import grpc.aio

from cortex_common.errors import CortexError, UnavailableError
from cortex_common.network import messages as m
from cortex_common.network import wire
from cortex_common.network.websocket_link import GatewayAccess, Link, Received, error_of, open_link
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.transfer import TrailerFrame, frame_from_bytes
from cortex_common.transfer.wire import receipt_to_proto

_MAX_QUEUED = 2


class WeightsChannel:
    """As much of a gRPC channel as transfers use."""

    def __init__(self, access: GatewayAccess) -> None:
        self._access = access
        self._idle: list[_Lane] = []
        self._closing: set[asyncio.Task[None]] = set()

    def as_channel(self) -> grpc.aio.Channel:
        """For those who know gRPC only."""
        return cast("grpc.aio.Channel", self)

    def stream_stream(self, _method: str, **_codecs: Any) -> Callable[[], PushCall]:
        """The upload of an update."""
        return lambda: PushCall(self)

    def unary_stream(self, _method: str, **_codecs: Any) -> Callable[[Any], PullCall]:
        """The download of a version."""
        return lambda request: PullCall(self, wire.pull_from_proto(request))

    async def close(self) -> None:
        """Hang up."""
        for lane in self._idle:
            self._discard(lane)
        self._idle.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    async def take(self, call: Call) -> _Lane:
        """A connection for one transfer."""
        while self._idle:
            lane = self._idle.pop()
            if lane.link.is_open:
                break
            self._discard(lane)
        else:
            lane = _Lane(await open_link(self._access, attends=False))
        lane.begin(call)
        return lane

    def give_back(self, lane: _Lane, *, is_clean: bool) -> None:
        """A transfer is over; the connection is used again if nothing of it is on the way any more."""
        if is_clean and lane.link.is_open:
            lane.begin(None)
            self._idle.append(lane)
        else:
            self._discard(lane)

    def _discard(self, lane: _Lane) -> None:
        task = asyncio.create_task(lane.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Lane:
    """A connection, and whose transfer is on it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._call: Call | None = None
        self._reading = asyncio.create_task(self._read())
        link.on_received = self._received

    def begin(self, call: Call | None) -> None:
        self._call = call

    async def close(self) -> None:
        self._call = None
        self._reading.cancel()
        await asyncio.wait((self._reading,))
        await self.link.close()

    async def _read(self) -> None:
        error = await self.link.run()
        if self._call is not None:
            self._call.fail(error)

    async def _received(self, received: Received) -> None:
        if self._call is not None:
            await self._call.received(received)


class Call:
    """A transfer; what both directions have in common."""

    def __init__(self, channel: WeightsChannel) -> None:
        self._channel = channel
        self._lane: _Lane | None = None
        self._number = 0
        self._error: CortexError | None = None
        self._changed = asyncio.Event()
        self._is_clean = False
        self._is_over = False

    def fail(self, error: CortexError) -> None:
        """It cannot go on."""
        self._error = self._error or error
        self._changed.set()

    async def received(self, received: Received) -> None:
        """A message or a frame for it came."""
        if isinstance(received, bytes):
            await self._take_frame(received)
        elif received.ref == self._number:
            if isinstance(received.message, m.ErrorMessage):
                # The gateway has let go of it, and passes over what is still on its way there.
                self._is_clean = True
                self.fail(error_of(received.message))
            else:
                self._take(received.message)
                self._changed.set()

    def cancel(self) -> None:
        """Let go of it; without effect on one that is over."""
        self._is_over = True
        lane, self._lane = self._lane, None
        if lane is not None:
            self._channel.give_back(lane, is_clean=self._is_clean)

    async def _begin(self, message: m.WeightsUpdate | m.ModelPull) -> Link:
        if self._lane is None:
            if self._is_over:
                raise UnavailableError("the transfer was cancelled")
            lane = await self._channel.take(self)
            self._lane, self._number = lane, lane.link.next_id()
            await lane.link.send(message, self._number)
        return self._lane.link

    async def _until(self, is_ready: Callable[[], bool]) -> None:
        while not is_ready():
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

    async def _take_frame(self, frame: bytes) -> None:
        """A frame came; by default not asked for."""

    def _take(self, message: m.Message) -> None:
        """A message came; by default not asked for."""


class PushCall(Call):
    """An upload, as `push_update` drives it."""

    def __init__(self, channel: WeightsChannel) -> None:
        super().__init__(channel)
        self._answers: list[aggregator_pb2.PushUpdateResponse] = []
        self._sent = 0
        self._passed_on = 0

    async def write(self, frame: bytes) -> None:
        """Send a frame, once there is room for it at the gateway.

        Raises:
            CortexError: why the upload ended.
        """
        link = await self._begin(m.WeightsUpdate())
        await self._until(lambda: self._sent - self._passed_on < link.welcome.window)
        if self._error is not None:
            raise self._error
        self._sent += 1
        await link.send_frame(frame)

    async def done_writing(self) -> None:
        """The trailer says so by itself."""

    async def read(self) -> aggregator_pb2.PushUpdateResponse:
        """The next answer.

        Raises:
            CortexError: why the upload ended.
        """
        await self._until(lambda: bool(self._answers))
        return self._answers.pop(0)

    def _take(self, message: m.Message) -> None:
        match message:
            case m.WeightsAck():
                self._passed_on = message.frames
            case m.WeightsResume():
                resume = aggregator_pb2.Resume(
                    first_chunk=message.first_chunk, already_accepted=message.already_accepted
                )
                self._answers.append(aggregator_pb2.PushUpdateResponse(resume=resume))
            case m.WeightsAccepted():
                self._is_clean = True
                receipt = receipt_to_proto(message.receipt)
                self._answers.append(aggregator_pb2.PushUpdateResponse(receipt=receipt))


class PullCall(Call):
    """A download, as `pull_model` drives it. What is not read holds the gateway back."""

    def __init__(self, channel: WeightsChannel, pull: m.ModelPull) -> None:
        super().__init__(channel)
        self._pull = pull
        self._frames: asyncio.Queue[bytes] = asyncio.Queue(_MAX_QUEUED)

    async def read(self) -> bytes:
        """The next frame.

        Raises:
            CortexError: why the download ended.
        """
        await self._begin(self._pull)
        await self._until(lambda: not self._frames.empty())
        return self._frames.get_nowait()

    async def _take_frame(self, frame: bytes) -> None:
        await self._frames.put(frame)
        self._is_clean = isinstance(frame_from_bytes(frame), TrailerFrame)
        self._changed.set()
