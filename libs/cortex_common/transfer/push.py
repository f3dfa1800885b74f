"""Sending an update: chunks made on the fly, resumed where the receiver left off, sealed once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, UnavailableError
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader
from cortex_common.tensors import ChunkRange, chunk_range
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.transfer.frames import HeaderFrame, TrailerFrame, chunk_head, frame_to_bytes
from cortex_common.transfer.pacing import UNPACED, Pace
from cortex_common.transfer.receipt import PushResult, Receipt
from cortex_common.transfer.retrying import Patience, on_thread, transferring, until_through
from cortex_common.transfer.wire import receipt_from_proto

PUSH_METHOD = "/cortex.v1.WeightService/PushUpdate"

EncodeChunk = Callable[[ChunkRange], bytes | bytearray | memoryview]
Progress = Callable[[int, int], None]
"""Told (chunks done, chunks in all)."""

FindChannel = Callable[[], grpc.aio.Channel]
"""Asked before each attempt: the receiver may have moved."""


async def push_update(
    channel: grpc.aio.Channel | FindChannel,
    header: ObjectHeader,
    encode_chunk: EncodeChunk,
    encryption: EncryptionManager,
    on_progress: Progress | None = None,
    *,
    clock: Clock | None = None,
    patience_s: float | None = None,
    pace: Pace = UNPACED,
) -> PushResult:
    """Upload one update and return once it is accepted, whatever happens to the connection meanwhile.

    Args:
        channel: To the aggregator, or what finds it.
        header: Made `fresh` for exactly this update; calling again with it needs the very same numbers.
        encode_chunk: Gives a chunk's plaintext (a codec payload). Called on another thread, one chunk at a time, and
            again for chunks that must be sent again; the result is used before the next call.
        encryption: Holds the key the header names.
        on_progress: Told after each chunk.
        clock: For waiting between attempts.
        patience_s: Give up when nothing has got through for so long; calling again with the same header goes on from
            there. Never, if None.
        pace: Of the way up.

    Raises:
        UnavailableError: the patience is over; says why the last attempt failed.
        PreconditionError: the round is not open (any more).
        InvalidArgumentError, ForbiddenError, ConflictError: the aggregator refuses the update.
        CorruptError, OverloadedError: still so after several attempts.
    """
    patience = None if patience_s is None else Patience(patience_s, clock)
    find = (lambda: channel) if isinstance(channel, grpc.aio.Channel) else channel
    push = _Push(find, header, encode_chunk, encryption, on_progress, patience, pace)
    receipt = await until_through(push.attempt, clock, patience)
    return PushResult(receipt, push.bytes_up)


class _Push:
    """One update on its way; remembers digests of chunks between attempts."""

    def __init__(
        self,
        channel: FindChannel,
        header: ObjectHeader,
        encode_chunk: EncodeChunk,
        encryption: EncryptionManager,
        on_progress: Progress | None,
        patience: Patience | None,
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._channel = channel
        self._patience = patience
        self._header = header
        self._encode = encode_chunk
        self._sealer = encryption.sealer(header)
        self._progress = on_progress
        self._digests: list[bytes] = []
        self._room = bytearray()
        self.bytes_up = 0

    async def attempt(self) -> Receipt:
        channel = self._channel()
        method: Callable[[], Any] = channel.stream_stream(
            PUSH_METHOD, response_deserializer=aggregator_pb2.PushUpdateResponse.FromString
        )
        call = method()
        try:
            with transferring(f"uploading round {self._header.round} of job {self._header.job_id}", channel):
                return await self._exchange(call)
        finally:
            call.cancel()

    async def _exchange(self, call: Any) -> Receipt:
        await _connected(call)
        await _write(call, frame_to_bytes(HeaderFrame(self._header)))
        resume = (await _read(call)).resume
        if not resume.already_accepted:
            await self._send_chunks(call, resume.first_chunk)
            trailer = TrailerFrame(self._header.chunks, content_digest(self._digests))
            await _write(call, frame_to_bytes(trailer))
            await call.done_writing()
        answer = await _read(call)
        if not answer.HasField("receipt"):
            raise CorruptError("the aggregator answered an upload without a receipt")
        receipt = receipt_from_proto(answer.receipt)
        self._require_own(receipt)
        return receipt

    def _require_own(self, receipt: Receipt) -> None:
        """The receipt is for this update, as far as it is known what was sent."""
        header = self._header
        wanted = (header.job_id, header.round, header.attempt, header.seat, header.sender)
        if (receipt.job_id, receipt.round, receipt.attempt, receipt.seat, receipt.worker) != wanted:
            raise CorruptError("the aggregator answered an upload with another one's receipt")
        is_repeat = not receipt.newly_accepted
        digest = content_digest(self._digests).hex()
        if not is_repeat and (receipt.content_sha256, receipt.weight) != (digest, header.weight):
            raise CorruptError("the aggregator answered an upload with the receipt of another content")

    async def _send_chunks(self, call: Any, first: int) -> None:
        """Send chunks from `first` on; the next one is made while the last one leaves."""
        total = self._header.chunks
        if first > total:
            raise CorruptError(f"the aggregator wants to resume at chunk {first} of {total}")
        while len(self._digests) < first:
            await on_thread(partial(self._frame, len(self._digests)))
        ahead = asyncio.create_task(on_thread(partial(self._frame, first))) if first < total else None
        try:
            for index in range(first, total):
                assert ahead is not None  # noqa: S101 - one frame is always on its way here
                frame = await asyncio.shield(ahead)
                following = partial(self._frame, index + 1)
                ahead = asyncio.create_task(on_thread(following)) if index + 1 < total else None
                await self._pace.take(self._header.job_id, len(frame))
                await _write(call, frame)
                self.bytes_up += len(frame)
                if self._patience:
                    self._patience.renew()
                if self._progress:
                    self._progress(index + 1, total)
        finally:
            if ahead is not None:
                await asyncio.wait((ahead,))

    def _frame(self, index: int) -> bytes:
        """Encode, seal and remember one chunk, in memory that is used again; runs on another thread, one at a time."""
        header = self._header
        plain = self._encode(chunk_range(index, header.elements, header.counters, header.chunk_elements))
        head = chunk_head(index, len(plain) + TAG_BYTES)
        size = len(head) + len(plain) + TAG_BYTES
        if len(self._room) < size:
            self._room = bytearray(size)
        frame = memoryview(self._room)[:size]
        frame[: len(head)] = head
        self._sealer.seal_into(index, plain, frame[len(head) :])
        if index == len(self._digests):
            self._digests.append(chunk_digest(frame))
        # gRPC takes nothing but bytes of their own.
        return bytes(frame)


async def _connected(call: Any) -> None:
    """Return once the call is on its way, or has ended: gRPC's `write` waits for ever on one cancelled before that."""
    if not isinstance(call, grpc.aio.StreamStreamCall):
        return
    waits = {asyncio.ensure_future(call.wait_for_connection()), asyncio.ensure_future(call.code())}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _write(call: Any, message: bytes) -> None:
    """Send one message; when the server has already ended the call, raise what it said."""
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        await _read(call)


async def _read(call: Any) -> aggregator_pb2.PushUpdateResponse:
    answer = await call.read()
    if not isinstance(answer, aggregator_pb2.PushUpdateResponse):
        raise UnavailableError("the aggregator ended an upload before its receipt")
    return answer
