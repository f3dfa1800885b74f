"""One upload stream: frames in, verified chunks into the spool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import TypeVar

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, CortexError, UnavailableError
from cortex_common.security.encryption import TAG_BYTES, ObjectHeader, Opener
from cortex_common.tensors import chunk_range
from cortex_common.transfer import ChunkFrame, Frame, TrailerFrame, frame_from_bytes
from cortex_common.transfer.content import content_digest
from cortex_common.validation import ValidationManager
from services.aggregator.spool import SeatSpool

T = TypeVar("T")


async def in_thread(work: Callable[[], T], executor: Executor | None = None) -> T:
    """Run blocking work on a thread and wait for its end even when cancelled: it uses files that are given up next.

    Args:
        work: What to do.
        executor: Whose thread; the loop's default one if None.
    """
    task = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


class Turn:
    """One at work on files that only one may change; `ended` tells that it has let go of them."""

    def __init__(self) -> None:
        self._interrupted: CortexError | None = None
        self.ended = asyncio.Event()

    def interrupt(self, error: CortexError) -> None:
        """Ask it to end with this error."""
        self._interrupted = self._interrupted or error

    def check(self) -> None:
        """Raise what it was interrupted with."""
        if self._interrupted is not None:
            raise self._interrupted


class Upload(Turn):
    """One stream for one seat or shard. Another one for the same, or the end of the round, interrupts it."""

    def __init__(self, messages: AsyncIterator[bytes], idle_s: float) -> None:
        super().__init__()
        self._messages = messages
        self._idle_s = idle_s
        self._scope: asyncio.Timeout | None = None

    def interrupt(self, error: CortexError) -> None:
        """Make the stream end with this error at its next frame."""
        super().interrupt(error)
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def next_frame(self) -> Frame:
        """The next frame.

        Raises:
            UnavailableError: the stream ended, or sent nothing for too long.
            CortexError: it was interrupted.
        """
        self.check()
        try:
            async with asyncio.timeout(self._idle_s) as self._scope:
                message = await anext(self._messages)
        except TimeoutError:
            self.check()
            raise UnavailableError(f"the upload sent nothing for {self._idle_s:g} s; it can be resumed") from None
        except StopAsyncIteration:
            raise UnavailableError("the upload ended before its trailer; it can be resumed") from None
        finally:
            self._scope = None
        self.check()
        return frame_from_bytes(message)


class Intake:
    """Takes the chunks of one update into its spool; runs on threads, one chunk at a time."""

    def __init__(self, spool: SeatSpool, opener: Opener, validation: ValidationManager) -> None:
        self.spool = spool
        self._opener = opener
        self._validation = validation
        self._codec = WeightCompressor.from_wire(spool.header.codec, spool.header.codec_options)
        self._scratch = bytearray()

    @property
    def next(self) -> int:
        """Index of the chunk that is due."""
        return self.spool.chunks

    @property
    def complete(self) -> bool:
        """All chunks are here."""
        return self.next == self.spool.header.chunks

    def prove(self) -> None:
        """Open what an earlier process left in the spool; the first chunk that does not open ends what is kept."""
        for index in range(self.spool.unproven):
            try:
                sealed = self.spool.read(index)
                self._opener.open_into(index, sealed, self._room(len(sealed)))
            except CorruptError:
                self.spool.keep(index)
                return
        self.spool.unproven = 0

    def take(self, chunk: ChunkFrame) -> None:
        """Open and check a chunk, then append it as it came, sealed.

        Raises:
            CorruptError: not the chunk that is due, or it does not open.
            InvalidArgumentError: a value is not finite.
            OverloadedError: the disk is full.
        """
        header = self.spool.header
        if chunk.index != self.next or chunk.index >= header.chunks:
            raise CorruptError(f"chunk {chunk.index} arrived where chunk {self.next} of {header.chunks} was due")
        part = chunk_range(chunk.index, header.elements, header.counters, header.chunk_elements)
        wanted = self._codec.max_payload_bytes(part)
        if len(chunk.sealed) > wanted + TAG_BYTES:
            raise CorruptError(f"chunk {chunk.index} has {len(chunk.sealed)} bytes; at most {wanted + TAG_BYTES} fit")
        payload = self._opener.open_into(chunk.index, chunk.sealed, self._room(wanted))
        self._validation.check_payload(self._codec, payload, part)
        self.spool.append(chunk.sealed)

    def finish(self, trailer: TrailerFrame) -> bytes:
        """Check the trailer against what is in the spool; gives the content's digest.

        Raises:
            CorruptError: chunks are missing, or the digest is another.
        """
        header = self.spool.header
        if trailer.chunks != header.chunks or not self.complete:
            raise CorruptError(f"the trailer counts {trailer.chunks} chunks, {self.next} of {header.chunks} are here")
        digest = content_digest(self.spool.digests)
        if digest != trailer.content_sha256:
            raise CorruptError(
                f"the trailer's digest is {trailer.content_sha256.hex()[:64]}, that of the chunks here {digest.hex()}"
            )
        return digest

    def _room(self, size: int) -> bytearray:
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return self._scratch


def payload_room(header: ObjectHeader, held_chunks: int) -> int:
    """Most bytes the rest of an update can take in the spool."""
    codec = WeightCompressor.from_wire(header.codec, header.codec_options)
    rest = max(header.chunks - held_chunks, 0)
    largest = codec.max_payload_bytes(chunk_range(0, header.elements, header.counters, header.chunk_elements))
    whole = codec.quantiser.body_bytes(header.elements) + 8 * header.counters + 32 * header.chunks
    return min(whole, rest * (largest + 32) + 8 * header.counters)
