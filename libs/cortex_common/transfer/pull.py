"""Fetching a model version: straight into the caller's arena, resumed after a cut, proven by its digest.

Who holds another version may be sent the delta from that: each chunk is added to the numbers held, in place. Whatever
goes wrong with it, the version is fetched whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, UnavailableError
from cortex_common.ids import JobId, RoundNumber, Sha256Hex
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader, ObjectKind, Opener
from cortex_common.tensors import Arena, Manifest, ManifestLimits, ModelDigest, chunk_count, chunk_range
from cortex_common.transfer.frames import ChunkFrame, Frame, HeaderFrame, TrailerFrame, frame_from_bytes
from cortex_common.transfer.pacing import UNPACED, Pace
from cortex_common.transfer.push import FindChannel, Progress
from cortex_common.transfer.retrying import Patience, on_thread, transferring, until_through

PULL_METHOD = "/cortex.v1.WeightService/PullModel"


@dataclass(frozen=True, slots=True)
class PullResult:
    """A version and what it cost. `arena` is None when the caller holds the version already."""

    header: ObjectHeader
    manifest: Manifest
    arena: Arena | None
    bytes_down: int


async def pull_model(
    find: FindChannel,
    job_id: JobId,
    sha256: Sha256Hex,
    held_sha256: str,
    encryption: EncryptionManager,
    allocate: Callable[[Manifest], Arena],
    round: RoundNumber = RoundNumber(0),  # noqa: A002, B008 - the wire's word; a plain int
    on_progress: Progress | None = None,
    *,
    limits: ManifestLimits | None = None,
    clock: Clock | None = None,
    patience_s: float | None = None,
    pace: Pace = UNPACED,
) -> PullResult:
    """Download a model version and verify that it is the one asked for.

    Args:
        find: The channel to the aggregator that holds it, for each attempt anew: it may move, or renew its certificate.
        job_id: Whose model.
        sha256: Digest of the version.
        held_sha256: Digest of the version the caller has, empty for none; when equal, no chunk travels.
        encryption: Holds the job's data key.
        allocate: Gives the arena the numbers go to, which holds the numbers of the version the caller has; called once
            per object, before the first chunk. From then on the arena holds no version until this returns.
        round: Round the download counts for.
        on_progress: Told after each chunk.
        limits: Largest layout to accept.
        clock: For waiting between attempts.
        patience_s: Give up when nothing has come for so long. Never, if None.
        pace: Of the way down.

    Raises:
        NotFoundError: the aggregator has no such version.
        CorruptError: it is not the version asked for, still so after several attempts.
        UnavailableError: the patience is over; says why the last attempt failed.
    """
    request = aggregator_pb2.PullModelRequest(job_id=job_id, sha256=sha256, held_sha256=held_sha256, round=round)
    patience = None if patience_s is None else Patience(patience_s, clock)
    pull = _Pull(find, request, encryption, allocate, on_progress, limits or ManifestLimits(), patience, pace)
    return await until_through(pull.attempt, clock, patience)


async def pull_frames(
    channel: grpc.aio.Channel, request: aggregator_pb2.PullModelRequest, what: str, pace: Pace = UNPACED
) -> AsyncGenerator[Frame]:
    """The frames of one download, trailer included, as they come: sealed, and checked by nobody yet.

    Args:
        channel: To the aggregator that holds the version.
        request: Which version, and from which chunk on.
        what: For errors: "downloading a model of job j1".
        pace: Of the way down: what came too fast is waited for, and flow control holds the sender back.

    Raises:
        UnavailableError: the stream broke off.
        NotFoundError: no such version there.
    """
    method: Callable[[Any], Any] = channel.unary_stream(
        PULL_METHOD, request_serializer=aggregator_pb2.PullModelRequest.SerializeToString
    )
    call = method(request)
    try:
        with transferring(what, channel):
            while True:
                data = await call.read()
                if not isinstance(data, bytes):
                    raise UnavailableError(f"{what}: the sender stopped before its trailer")
                frame = frame_from_bytes(data)
                yield frame
                if isinstance(frame, TrailerFrame):
                    return
                await pace.take(request.job_id, len(data))
    finally:
        call.cancel()


def pull_request(
    job_id: JobId, sha256: str, first_chunk: int, number: RoundNumber, held_sha256: str = ""
) -> aggregator_pb2.PullModelRequest:
    """Ask for a version from a chunk on; the bytes count for round `number`."""
    return aggregator_pb2.PullModelRequest(
        job_id=job_id, sha256=sha256, held_sha256=held_sha256, first_chunk=first_chunk, round=number
    )


def check_offer(header: ObjectHeader, job_id: str, sha256: str, held_sha256: str) -> None:
    """An object on offer gives the version asked for.

    Raises:
        CorruptError: it gives another one, or is the delta from one that is not held.
    """
    if header.kind not in (ObjectKind.MODEL, ObjectKind.DELTA) or header.model_sha256 != sha256:
        raise CorruptError(f"asked for model {sha256}, was offered {header.model_sha256 or header.kind}")
    if header.job_id != job_id:
        raise CorruptError(f"asked for a model of job {job_id}, was offered one of {header.job_id}")
    if header.kind is ObjectKind.DELTA and header.base_sha256 != held_sha256:
        raise CorruptError(f"model {sha256} was offered as the delta from {header.base_sha256}, which is not held")


class _Intake:
    """Opens, decodes and digests the chunks of one object in order; its `take` runs on another thread."""

    def __init__(self, header: ObjectHeader, manifest: Manifest, arena: Arena, opener: Opener) -> None:
        arena.require(manifest)
        self.header = header
        self.manifest = manifest
        self.arena = arena
        self._opener = opener
        self._codec = WeightCompressor.from_wire(header.codec, header.codec_options)
        self._digest = ModelDigest(manifest)
        self._scratch = bytearray()
        self.next = 0

    def take(self, chunk: ChunkFrame) -> None:
        if chunk.index != self.next:
            raise CorruptError(f"chunk {chunk.index} arrived where chunk {self.next} was due")
        header = self.header
        part = chunk_range(chunk.index, header.elements, header.counters, header.chunk_elements)
        wanted = self._codec.max_payload_bytes(part)
        if len(self._scratch) < wanted:
            self._scratch = bytearray(wanted)
        if len(chunk.sealed) > wanted + TAG_BYTES:
            raise CorruptError(f"chunk {chunk.index} is longer than its range allows")
        plain = self._opener.open_into(chunk.index, chunk.sealed, self._scratch)
        if part.is_counters:
            self.arena.counters[:] = self._codec.decode_counters(plain, part.elements)
            self._digest.update(self.arena.counters)
        else:
            target = self.arena.values[part.start : part.stop]
            if self.header.kind is ObjectKind.DELTA:
                self._codec.decode_add(plain, target, 1.0)
            else:
                self._codec.decode(plain, part.elements, target)
            self._digest.update(target)
        self.next += 1

    def finish(self) -> None:
        if self.next != self.header.chunks:
            raise CorruptError(f"the download ended after {self.next} of {self.header.chunks} chunks")
        if self._digest.hexdigest() != self.header.model_sha256:
            raise CorruptError(f"the downloaded model's digest is not {self.header.model_sha256}")


class _Pull:
    """One download on its way; keeps the chunks it has between attempts."""

    def __init__(
        self,
        channel: FindChannel,
        request: aggregator_pb2.PullModelRequest,
        encryption: EncryptionManager,
        allocate: Callable[[Manifest], Arena],
        on_progress: Progress | None,
        limits: ManifestLimits,
        patience: Patience | None,
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._channel = channel
        self._request = request
        self._encryption = encryption
        self._allocate = allocate
        self._progress = on_progress
        self._limits = limits
        self._patience = patience
        self._intake: _Intake | None = None
        self._bytes = 0

    async def attempt(self) -> PullResult:
        self._request.first_chunk = self._intake.next if self._intake else 0
        what = f"downloading a model of job {self._request.job_id}"
        frames = pull_frames(self._channel(), self._request, what, self._pace)
        try:
            async with aclosing(frames):
                return await self._receive(frames)
        except CorruptError:
            self._intake = None
            # A delta may have been added in part: the numbers held are no version any more.
            self._request.held_sha256 = ""
            raise

    async def _receive(self, frames: AsyncIterator[Frame]) -> PullResult:
        first = await anext(frames)
        if not isinstance(first, HeaderFrame):
            raise CorruptError("a download must begin with its header")
        manifest = self._checked(first.header)
        if self._request.held_sha256 == self._request.sha256:
            return PullResult(first.header, manifest, None, self._bytes)
        intake = self._intake_for(first, manifest)
        while isinstance(frame := await anext(frames), ChunkFrame):
            await on_thread(partial(intake.take, frame))
            self._bytes += len(frame.sealed)
            if self._patience:
                self._patience.renew()
            if self._progress:
                self._progress(intake.next, intake.header.chunks)
        intake.finish()
        return PullResult(intake.header, manifest, intake.arena, self._bytes)

    def _checked(self, header: ObjectHeader) -> Manifest:
        """The layout of the version asked for, after every limit has been checked."""
        request = self._request
        check_offer(header, request.job_id, request.sha256, request.held_sha256)
        manifest = Manifest.from_json(header.manifest, self._limits)
        shape = (manifest.sha256, manifest.elements, manifest.counters)
        chunks = chunk_count(manifest.elements, manifest.counters, header.chunk_elements)
        if shape != (header.manifest_sha256, header.elements, header.counters) or chunks != header.chunks:
            raise CorruptError("the model's header contradicts its manifest")
        return manifest

    def _intake_for(self, frame: HeaderFrame, manifest: Manifest) -> _Intake:
        intake = self._intake
        if intake is None or replace(intake.header, manifest=b"") != replace(frame.header, manifest=b""):
            if frame.first_chunk:
                raise CorruptError("the version was sealed anew in the middle of a download")
            opener = self._encryption.opener(frame.header)
            intake = self._intake = _Intake(frame.header, manifest, self._allocate(manifest), opener)
        return intake
