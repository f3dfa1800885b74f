"""Relay: a region's copy of the root's version, whole or as a delta, fetched once and served to all below it.

The copy is stored as it came, sealed: no key is needed here, and workers verify the digest after opening it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, CortexError, PreconditionError, UnavailableError
from cortex_common.ids import JobId, RoundNumber, Sha256Hex
from cortex_common.logging import get_logger
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.storage import BlobWriter
from cortex_common.tensors import Manifest
from cortex_common.transfer import ChunkFrame, HeaderFrame, TrailerFrame
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.transfer.frames import Frame
from cortex_common.transfer.pacing import UNPACED, Pace
from cortex_common.transfer.pull import check_offer, pull_frames, pull_request
from cortex_common.transfer.retrying import until_through
from cortex_common.validation import ValidationManager
from services.aggregator import metrics
from services.aggregator.client import Channels
from services.aggregator.domain import RoundKey, Upstream
from services.aggregator.rounds import LiveRound, members_of
from services.aggregator.sharing import SharedWork
from services.aggregator.uploads import in_thread
from services.aggregator.versions import SealedPart, Version, VersionStore

log = get_logger(__name__)


class Relay:
    """Fetches versions from one tier up; whoever asks for one that is on its way waits for the same download."""

    def __init__(
        self,
        versions: VersionStore,
        channels: Channels,
        validation: ValidationManager,
        clock: Clock,
        rounds: Mapping[RoundKey, LiveRound],
        pace: Pace = UNPACED,
    ) -> None:
        self.pace = pace
        self.rounds = rounds
        self.versions = versions
        self.channels = channels
        self.validation = validation
        self.clock = clock
        self._running: dict[tuple[JobId, str], _Download] = {}
        self._relayed: dict[JobId, int] = {}

    async def fetch(self, upstream: Upstream, sha256: str, held_sha256: str, number: RoundNumber) -> Version:
        """The version, durable here: as a delta if there is one from the version held, otherwise whole.

        The download goes on when the caller gives up, for the next who asks. Who asks while it runs gets what it
        fetches, from where the upper aggregator is now, whether that suits or not: ask again.

        Raises:
            PreconditionError, UnavailableError: it was stopped meanwhile.
            NotFoundError: it is not there either.
            CorruptError, OverloadedError: still so after several attempts.
        """
        key = (upstream.model_job_id, sha256)
        download = self._running.get(key)
        if download is None:
            download = self._running[key] = _Download(self, upstream, sha256, held_sha256, number)
            download.work.task.add_done_callback(lambda _: self._running.pop(key, None))
        download.upstream = upstream
        return await download.work.result()

    def redirect(self, upstream: Upstream) -> None:
        """Let downloads of a job go on from another aggregator; whoever waits need not ask again."""
        for (job_id, _), download in self._running.items():
            if job_id == upstream.model_job_id:
                download.upstream = upstream

    async def stop(self, job_id: JobId, error: CortexError) -> None:
        """End the downloads of a job; whoever waits for one gets the error."""
        for work in [download.work for (job, _), download in self._running.items() if job == job_id]:
            await work.stop(error)

    def count(self, job_id: JobId, size: int) -> None:
        """Account bytes fetched."""
        metrics.BYTES_RELAYED.inc(size)
        self._relayed[job_id] = self._relayed.get(job_id, 0) + size

    def take_relayed(self, job_id: JobId) -> int:
        """Bytes of a job's versions fetched since this was asked last."""
        return self._relayed.pop(job_id, 0)

    def close(self) -> None:
        """Give up downloads under way."""
        for download in self._running.values():
            download.work.cancel(UnavailableError("the aggregator is stopping; ask again when it is back"))


class _Download:
    """One version on its way; keeps the chunks it has between attempts."""

    def __init__(self, relay: Relay, upstream: Upstream, sha256: str, held_sha256: str, number: RoundNumber) -> None:
        self._count = relay.count
        self._pace = relay.pace
        self._versions = relay.versions
        self._channels = relay.channels
        self._validation = relay.validation
        self._clock = relay.clock
        self._rounds = relay.rounds
        self.upstream = upstream
        self._sha256 = sha256
        self._held_sha256 = held_sha256
        self._number = number
        self._header: ObjectHeader | None = None
        self._blob = ""
        self._target: BlobWriter | None = None
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self.work = SharedWork(self._through())

    async def _through(self) -> Version:
        try:
            return await until_through(self.attempt, self._clock)
        finally:
            self._start_again()

    async def attempt(self) -> Version:
        request = pull_request(
            self.upstream.model_job_id, self._sha256, len(self._sizes), self._number, held_sha256=self._held_sha256
        )
        what = f"fetching a model of job {self.upstream.model_job_id} from {self.upstream.aggregator}"
        channel = self._channels.to(self.upstream.address, self.upstream.aggregator)
        frames = pull_frames(channel, request, what, self._pace)
        try:
            async with aclosing(frames):
                return await self._receive(frames)
        except CorruptError:
            self._start_again()
            raise

    async def _receive(self, frames: AsyncIterator[Frame]) -> Version:
        first = await anext(frames)
        if not isinstance(first, HeaderFrame):
            raise CorruptError("a download must begin with its header")
        target = self._target_for(first)
        while isinstance(frame := await anext(frames), ChunkFrame):
            if frame.index != len(self._sizes):
                raise CorruptError(f"chunk {frame.index} arrived where chunk {len(self._sizes)} was due")
            await in_thread(lambda sealed=frame.sealed: target.write(sealed))  # type: ignore[misc]
            self._sizes.append(len(frame.sealed))
            self._digests.append(chunk_digest(frame.sealed))
            self._count(first.header.job_id, len(frame.sealed))
        return await in_thread(lambda: self._finished(first.header, target, frame))

    def _target_for(self, frame: HeaderFrame) -> BlobWriter:
        """Where the rest of the object goes; another object begins anew."""
        header = frame.header
        check_offer(header, self.upstream.model_job_id, self._sha256, self._held_sha256)
        self._validation.read_manifest(header.manifest)
        if self._header is not None and self._header.object_id != header.object_id:
            raise CorruptError("the version was sealed anew in the middle of a download")
        if self._target is None:
            self._header = header
            self._blob, self._target = self._versions.create(header)
        return self._target

    def _finished(self, header: ObjectHeader, target: BlobWriter, trailer: object) -> Version:
        if not isinstance(trailer, TrailerFrame) or len(self._sizes) != header.chunks:
            raise CorruptError(f"the download ended after {len(self._sizes)} of {header.chunks} chunks")
        content = content_digest(self._digests)
        if content != trailer.content_sha256:
            raise CorruptError("the downloaded version's chunks are not those its sender announced")
        target.commit()
        part = SealedPart(header, tuple(self._sizes), self._blob, Sha256Hex(content.hex()))
        return self._committed(part)

    def _committed(self, part: SealedPart) -> Version:
        """The copy with this part, beside what is here of the same version already."""
        header = part.header
        known = self._versions.of_round(header.job_id, header.round)
        if known is not None and (known.sha256, known.header.attempt) != (self._sha256, header.attempt):
            known = None
        delta = part if header.kind is ObjectKind.DELTA else known.delta if known else None
        whole = part if header.kind is ObjectKind.MODEL else known.whole if known else None
        shown = whole or part
        version = Version(
            header=shown.header,
            sizes=whole.sizes if whole else (),
            content_sha256=whole.content_sha256 if whole else Sha256Hex(""),
            blob=whole.blob if whole else "",
            delta=delta,
            file_bytes=Manifest.from_json(header.manifest).file_bytes,
            update_norm=0.0,
            contributions=(),
            sequence=0,
            created_s=self._clock.wall_s(),
            readers=tuple(sorted(members_of(self._rounds, header.job_id).union(known.readers if known else ()))),
        )
        try:
            self._versions.commit(version)
        except PreconditionError:
            self._versions.erase((self._blob,))
            raise
        facts = {"sha256": version.sha256, "part": header.kind, "bytes": sum(part.sizes)}
        log.info("version_relayed", job_id=header.job_id, round=header.round, **facts)
        return version

    def _start_again(self) -> None:
        if self._target is not None:
            self._target.__exit__(None, None, None)
        self._header = self._target = None
        self._sizes, self._digests = [], []
