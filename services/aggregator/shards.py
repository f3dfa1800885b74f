"""Sealed shards of data sets, as operators have brought them: kept and sent as they are, no key to them is here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError
from cortex_common.ids import Sha256Hex
from cortex_common.logging import get_logger
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.security.shards import sealed_size
from cortex_common.storage import BlobStore, BlobWriter
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.storage.durable import require_room
from cortex_common.transfer import ChunkFrame, Frame, HeaderFrame, TrailerFrame, frame_from_bytes
from cortex_common.transfer.content import chunk_digest, content_digest
from services.aggregator.uploads import in_thread
from services.aggregator.versions import PartReader, SealedPart

log = get_logger(__name__)

_MAX_CHUNK_BYTES = 4 << 20
_FACTS = ".json"


@dataclass(frozen=True, slots=True)
class Room:
    """Where shards are kept, and how many bytes are to stay free there; an object store has no end."""

    folder: Path | None
    reserve_bytes: int

    def require(self, size: int) -> None:
        """Refuse what does not fit. OverloadedError: says what is free."""
        if self.folder is not None:
            require_room(self.folder, size, self.reserve_bytes)


class ShardStore:
    """Shards by the digest of their sealed chunks: a blob, and then its facts; one without is no shard."""

    def __init__(self, blobs: BlobStore, room: Room) -> None:
        """Find what is there."""
        self._blobs = blobs
        self._room = room
        self._parts: dict[str, SealedPart] = {}
        for name in list(blobs.names("")):
            if name.endswith(_FACTS):
                self._load(name)

    def part(self, sha256: str) -> SealedPart | None:
        """The shard with this digest, if it is here."""
        return self._parts.get(sha256)

    def open(self, part: SealedPart) -> PartReader:
        """Read its chunks."""
        return PartReader(part, self._blobs.open(part.blob))

    async def put(self, messages: AsyncIterator[bytes]) -> bool:
        """Take a shard as it comes; False if it is here already.

        Raises:
            InvalidArgumentError: it is no shard.
            CorruptError: its chunks are not what its header and trailer say.
            OverloadedError: there is no room.
        """
        frames = (frame_from_bytes(message) async for message in messages)
        first = await _next(frames)
        if not isinstance(first, HeaderFrame) or first.first_chunk:
            raise InvalidArgumentError("shard: its header is missing; allowed: header, chunks in order, trailer")
        header = first.header
        _check(header)
        if header.model_sha256 in self._parts:
            return False
        self._room.require(header.elements)
        part = SealedPart(header, (), f"{header.model_sha256}.shard", Sha256Hex(""))
        with self._blobs.create(part.blob) as target:
            intake = _Intake(part, target)
            while not isinstance(frame := await _next(frames), TrailerFrame):
                await in_thread(lambda frame=frame: intake.take(frame))  # type: ignore[misc]
            part = await in_thread(lambda: self._keep(intake.finished(frame), target))
        self._parts[header.model_sha256] = part
        log.info("shard_stored", dataset=header.job_id, index=header.round, bytes=sum(part.sizes))
        return True

    def drop(self, digests: Iterable[str]) -> int:
        """Erase shards; how many there were. Blocks."""
        gone = [part for sha256 in digests if (part := self._parts.pop(sha256, None)) is not None]
        for part in gone:
            self._blobs.delete(f"{part.header.model_sha256}{_FACTS}")
            self._blobs.delete(part.blob)
        return len(gone)

    def _keep(self, part: SealedPart, target: BlobWriter) -> SealedPart:
        facts = {"header": part.header.to_facts(), "sizes": part.sizes, "content_sha256": part.content_sha256}
        self._blobs.publish(f"{part.header.model_sha256}{_FACTS}", to_checked_json(facts), [target])
        return part

    def _load(self, name: str) -> None:
        try:
            with self._blobs.open(name) as blob:
                facts = from_checked_json(blob.read_at(0, blob.size))
            header = ObjectHeader.from_facts(facts["header"])
            sizes = tuple(int(size) for size in facts["sizes"])
            blob_name = f"{header.model_sha256}.shard"
            self._parts[header.model_sha256] = SealedPart(header, sizes, blob_name, Sha256Hex(facts["content_sha256"]))
        except (CortexError, KeyError, TypeError, ValueError) as error:
            log.error("shard_set_aside", path=self._blobs.set_aside(name), reason=str(error))


class _Intake:
    """One shard on its way into the store."""

    def __init__(self, part: SealedPart, target: BlobWriter) -> None:
        self._part = part
        self._target = target
        self._sizes: list[int] = []
        self._tags: list[bytes] = []
        self._digest = hashlib.sha256()

    def take(self, frame: Frame) -> None:
        header, due = self._part.header, len(self._sizes)
        if not isinstance(frame, ChunkFrame) or frame.index != due or due >= header.chunks:
            raise CorruptError(f"{self._part.what}: something else came where chunk {due} of {header.chunks} was due")
        if len(frame.sealed) != sealed_size(header, due):
            raise CorruptError(f"{self._part.what}: chunk {due} has {len(frame.sealed)} bytes")
        self._target.write(frame.sealed)
        self._digest.update(frame.sealed)
        self._sizes.append(len(frame.sealed))
        self._tags.append(chunk_digest(frame.sealed))

    def finished(self, trailer: TrailerFrame) -> SealedPart:
        header, content = self._part.header, content_digest(self._tags)
        if (len(self._sizes), content) != (header.chunks, trailer.content_sha256):
            raise CorruptError(f"{self._part.what}: its chunks are not those its trailer tells of")
        if self._digest.hexdigest() != header.model_sha256:
            raise CorruptError(f"{self._part.what}: its chunks are not those of {header.model_sha256}")
        return replace(self._part, sizes=tuple(self._sizes), content_sha256=Sha256Hex(content.hex()))


def _check(header: ObjectHeader) -> None:
    """A header that can be a shard's.

    Raises:
        InvalidArgumentError: it cannot.
    """
    size, chunk = header.elements, header.chunk_elements
    if header.kind is not ObjectKind.SHARD or len(json.dumps(header.to_facts())) > 4096:
        raise InvalidArgumentError(f"shard: an object of kind {header.kind} given; allowed: shard")
    is_digest = len(header.model_sha256) == 64 and not set(header.model_sha256) - set("0123456789abcdef")
    if not is_digest or not 0 < chunk <= _MAX_CHUNK_BYTES or size < 1 or header.chunks != -(-size // chunk):
        raise InvalidArgumentError("shard: digest, length or chunks in its header are impossible")


async def _next(frames: AsyncIterator[Frame]) -> Frame:
    frame = await anext(frames, None)
    if frame is None:
        raise CorruptError("shard: it ended before its trailer")
    return frame
