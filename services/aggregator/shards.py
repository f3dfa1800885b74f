"""Sealed shards of data sets, as operators have brought them: kept and sent as they are, no key to them is here."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cortex_common.data.sealed import MAX_SHARD_BYTES
from cortex_common.errors import (
    ConflictError,
    CorruptError,
    CortexError,
    InvalidArgumentError,
    OverloadedError,
    UnavailableError,
    Violation,
)
from cortex_common.ids import Sha256Hex
from cortex_common.logging import get_logger
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.security.shards import sealed_bytes, sealed_size
from cortex_common.storage import BlobStore
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.transfer import ChunkFrame, Frame, HeaderFrame, TrailerFrame
from services.aggregator.incoming_shards import IncomingShards
from services.aggregator.shard_spool import ShardSpool
from services.aggregator.uploads import Turn, Upload, in_thread
from services.aggregator.versions import PartReader, SealedPart

log = get_logger(__name__)

_CHUNK_BYTES = range(1024, (4 << 20) + 1)
_MAX_HEADER_BYTES = 4096
_FACTS, _BLOB, _DAMAGED = ".json", ".shard", ".json.damaged"


@dataclass(frozen=True, slots=True)
class Held:
    """What is here of a shard: its first chunks, and their sealed bytes; or all of it, durable."""

    chunks: int = 0
    size_bytes: int = 0
    complete: bool = False


class ShardStore:
    """Shards by the digest of their sealed chunks: a blob, and then its facts; one without is no shard.

    Args:
        blobs: Where shards are kept.
        incoming: Those that are on their way.
        idle_s: An upload that sends nothing for so long is ended.
    """

    def __init__(self, blobs: BlobStore, incoming: IncomingShards, idle_s: float) -> None:
        """Find what is there; a blob without facts was never finished and is removed."""
        self._blobs = blobs
        self._incoming = incoming
        self._idle_s = idle_s
        self._parts: dict[str, SealedPart] = {}
        self._turns: dict[str, Turn] = {}
        names = set(blobs.names(""))
        for name in sorted(names):
            if name.endswith(_FACTS):
                self._load(name)
        for name in names:
            shard = name.removesuffix(_BLOB)
            if name.endswith(_BLOB) and names.isdisjoint({shard + _FACTS, shard + _DAMAGED}):
                blobs.delete(name)
        incoming.load(self._parts)

    def part(self, sha256: str) -> SealedPart | None:
        """The shard with this digest, if it is here."""
        return self._parts.get(sha256)

    def open(self, part: SealedPart) -> PartReader:
        """Read its chunks."""
        return PartReader(part, self._blobs.open(part.blob))

    async def offer(self, header: ObjectHeader) -> Held:
        """How much of a shard is here.

        Raises:
            InvalidArgumentError: it is no shard.
        """
        check_header(header)
        if header.model_sha256 in self._parts:
            return Held(header.chunks, sealed_bytes(header, header.chunks), complete=True)
        spool = self._incoming.find(header)
        if spool is None:
            return Held()
        await in_thread(spool.prove)
        return Held(spool.chunks, spool.size_bytes)

    async def put(self, messages: AsyncIterator[bytes]) -> bool:
        """Take a shard as it comes, from its first chunk or one that is due; False if it is here already.

        Raises:
            InvalidArgumentError: it is no shard.
            CorruptError: its chunks are not what its header and trailer say, or begin after those that are here.
            OverloadedError: there is no room.
            UnavailableError: the stream broke off; what came stays.
            ConflictError: a newer upload of the shard took over, or it was dropped.
        """
        upload = Upload(messages, self._idle_s)
        first = await upload.next_frame()
        if not isinstance(first, HeaderFrame):
            raise InvalidArgumentError("shard: its header is missing; allowed: header, chunks in order, trailer")
        sha256 = first.header.model_sha256
        check_header(first.header)
        if sha256 in self._parts:
            return False
        await self._remove_old(sha256)
        async with self._alone(sha256, upload, "a newer upload took over"):
            if sha256 in self._parts:
                return False
            await self._take(first, upload)
            return True

    async def drop(self, digests: Iterable[str]) -> int:
        """Erase shards, and what is here of unfinished ones; how many there were."""
        known = [each for each in dict.fromkeys(digests) if each in self._turns or self._has(each)]
        gone = 0
        for sha256 in known:
            async with self._alone(sha256, Turn(), "it was dropped meanwhile"):
                gone += self._has(sha256)
                await in_thread(lambda sha256=sha256: self._erase(sha256))  # type: ignore[misc]
        return gone

    def stop(self) -> None:
        """End all uploads; what has come stays."""
        for turn in self._turns.values():
            turn.interrupt(UnavailableError("the aggregator stops; the upload can be resumed when it is back"))

    async def _remove_old(self, wanted: str) -> None:
        """Make room for a shard that somebody goes on with."""
        for sha256 in await in_thread(self._incoming.old):
            if sha256 != wanted and sha256 not in self._turns:
                async with self._alone(sha256, Turn(), "it was too old"):
                    await in_thread(lambda sha256=sha256: self._incoming.erase_if_old(sha256))  # type: ignore[misc]

    @asynccontextmanager
    async def _alone(self, sha256: str, turn: Turn, why: str) -> AsyncIterator[None]:
        """Change a shard's files, and nobody else: who did before is told why not any more, and lets go first."""
        while (older := self._turns.get(sha256)) is not None:
            older.interrupt(ConflictError(f"shard {sha256}: {why}"))
            await older.ended.wait()
        self._turns[sha256] = turn
        try:
            yield
        finally:
            del self._turns[sha256]
            turn.ended.set()

    async def _take(self, first: HeaderFrame, upload: Upload) -> None:
        """Go on with a shard, to its end or as far as it comes."""
        spool = await in_thread(lambda: self._incoming.open(first.header))
        try:
            due = first.first_chunk
            if due > spool.chunks:
                raise CorruptError(f"{spool.what}: chunk {due} is offered where chunk {spool.chunks} is due")
            if due:
                log.info("shard_resumed", dataset=first.header.job_id, index=first.header.round, chunk=due)
            while not isinstance(frame := await upload.next_frame(), TrailerFrame):
                await in_thread(lambda frame=frame, due=due: _take_chunk(spool, frame, due))  # type: ignore[misc]
                due += 1
            await in_thread(lambda: self._keep(spool, frame))
        except (OverloadedError, CorruptError) as error:
            # What a full disk or a wrong whole left behind helps nobody; a wrong chunk leaves good ones before it.
            if isinstance(error, OverloadedError) or spool.is_spoilt:
                await in_thread(lambda: self._incoming.erase(first.header.model_sha256))
            raise
        finally:
            await in_thread(spool.close)

    def _keep(self, spool: ShardSpool, trailer: TrailerFrame) -> None:
        """Make a shard whose chunks are all here count. On a thread, to its end, even if nobody waits for it."""
        header = spool.header
        content = Sha256Hex(spool.finish(trailer).hex())
        sizes = tuple(sealed_size(header, index) for index in range(header.chunks))
        part = SealedPart(header, sizes, f"{header.model_sha256}{_BLOB}", content)
        facts = to_checked_json({"header": header.to_facts(), "sizes": sizes, "content_sha256": content})
        spool.close()
        try:
            with self._blobs.adopt(part.blob, spool.path) as target:
                self._blobs.publish(f"{header.model_sha256}{_FACTS}", facts, [target])
        except OverloadedError:
            self._blobs.delete(part.blob)
            raise
        self._parts[header.model_sha256] = part
        self._incoming.erase(header.model_sha256)
        log.info("shard_stored", dataset=header.job_id, index=header.round, bytes=sum(sizes))

    def _has(self, sha256: str) -> bool:
        return sha256 in self._parts or sha256 in self._incoming

    def _erase(self, sha256: str) -> None:
        self._incoming.erase(sha256)
        part = self._parts.pop(sha256, None)
        if part is not None:
            self._blobs.delete(f"{sha256}{_FACTS}")
            self._blobs.delete(part.blob)

    def _load(self, name: str) -> None:
        try:
            with self._blobs.open(name) as blob:
                facts = from_checked_json(blob.read_at(0, blob.size))
            header = ObjectHeader.from_facts(facts["header"])
            sizes = tuple(int(size) for size in facts["sizes"])
            blob_name = f"{header.model_sha256}{_BLOB}"
            self._parts[header.model_sha256] = SealedPart(header, sizes, blob_name, Sha256Hex(facts["content_sha256"]))
        except (CortexError, KeyError, TypeError, ValueError) as error:
            log.error("shard_set_aside", path=self._blobs.set_aside(name), reason=str(error))


def check_header(header: ObjectHeader) -> None:
    """A header that can be a shard's.

    Raises:
        InvalidArgumentError: it cannot; tells all that is wrong, and what is allowed.
    """
    size, chunk = header.elements, header.chunk_elements
    chunks = -(-size // max(chunk, 1))
    digest, digits = header.model_sha256, set("0123456789abcdef")
    rules = (
        ("kind", header.kind is ObjectKind.SHARD, header.kind, "shard"),
        ("model_sha256", len(digest) == 64 and digits.issuperset(digest), digest[:80], "64 of 0 to 9 and a to f"),
        ("elements", 0 < size <= MAX_SHARD_BYTES, size, f"1 to {MAX_SHARD_BYTES} bytes"),
        ("chunk_elements", chunk in _CHUNK_BYTES, chunk, f"{_CHUNK_BYTES[0]} to {_CHUNK_BYTES[-1]} bytes"),
        ("chunks", header.chunks == chunks, header.chunks, f"{chunks}, for so many elements"),
        ("manifest", not header.manifest, f"{len(header.manifest)} bytes", "none"),
        ("weight", math.isfinite(header.weight), header.weight, "the number of examples"),
    )
    wrong = [
        Violation(f"header.{name}", f"{given!s} given; allowed: {told}")
        for name, fits, given, told in rules
        if not fits
    ]
    if not wrong and (length := len(json.dumps(header.to_facts()))) > _MAX_HEADER_BYTES:
        wrong = [Violation("header", f"{length} bytes of text given; allowed: {_MAX_HEADER_BYTES}")]
    if wrong:
        raise InvalidArgumentError.of("shard", wrong)


def _take_chunk(spool: ShardSpool, frame: Frame, due: int) -> None:
    """Take a chunk that is due, unless it is here.

    Raises:
        CorruptError: something else came, or it has another length.
        OverloadedError: the disk is full.
    """
    header = spool.header
    if not isinstance(frame, ChunkFrame) or frame.index != due or due >= header.chunks:
        raise CorruptError(f"{spool.what}: something else came where chunk {due} of {header.chunks} was due")
    if len(frame.sealed) != sealed_size(header, due):
        raise CorruptError(f"{spool.what}: chunk {due} has {len(frame.sealed)} bytes")
    if due == spool.chunks:
        spool.append(frame.sealed)
