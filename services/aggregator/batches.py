"""BatchProcessor: one pass over many sealed updates, chunk by chunk. Legend: n elements of one chunk, K updates.

Memory is a few chunks per thread, whatever the model's size and the number of updates. Updates are added in the order
given, in float64; so the result does not depend on the order of arrival or on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.ids import Sha256Hex
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader, Opener
from cortex_common.storage import BlobWriter
from cortex_common.tensors import ChunkRange, Float32s, Int64s, Manifest, ModelDigest, iter_chunks
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.validation import sum_of_squares
from services.aggregator.strategies import OuterStrategy

_FOLDS = 4


class SealedChunks(Protocol):
    """Where sealed chunks are read from: a seat's spool or a version's blob."""

    header: ObjectHeader

    def read(self, index: int) -> bytes:
        """Sealed chunk `index`."""


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What to fold. `base` is None in round 0, where the only update is the version itself."""

    manifest: Manifest
    base: SealedChunks | None
    updates: Sequence[SealedChunks]
    weights: Sequence[float]
    strategy: OuterStrategy
    header: ObjectHeader
    """Of the new version, fresh, without its digest."""


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What came out: the header with the digest, and facts of the sealed blob."""

    header: ObjectHeader
    sizes: tuple[int, ...]
    content_sha256: Sha256Hex
    update_norm: float


@dataclass(slots=True)
class _Scratch:
    """Buffers of one chunk in work."""

    values_n: Float32s
    sum_n: NDArray[np.float64]
    plain: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class _Done:
    """One chunk of the new version."""

    numbers: Float32s | Int64s
    sealed: bytes
    digest: bytes
    square: float
    scratch: _Scratch


class BatchProcessor:
    """Folds updates into a version with a fixed number of threads."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fold")
        self.leads = ThreadPoolExecutor(_FOLDS, thread_name_prefix="lead")
        """Threads to call `fold` on: so many folds at a time, the others wait."""

    def close(self) -> None:
        """End the threads."""
        self.leads.shutdown()
        self._pool.shutdown()

    def fold(self, plan: FoldPlan, encryption: EncryptionManager, target: BlobWriter) -> FoldResult:
        """Write the next version's sealed chunks to `target`.

        Raises:
            CorruptError: an update or the base does not open.
            PreconditionError: the result is not finite.
        """
        work = _Fold(plan, encryption)
        digest = ModelDigest(plan.manifest)
        sizes: list[int] = []
        digests: list[bytes] = []
        square = 0.0
        for done in self._in_order(work):
            digest.update(done.numbers)
            target.write(done.sealed)
            sizes.append(len(done.sealed))
            digests.append(done.digest)
            square += done.square
            work.give_back(done.scratch)
        content = Sha256Hex(content_digest(digests).hex())
        header = replace(plan.header, model_sha256=digest.hexdigest())
        return FoldResult(header, tuple(sizes), content, float(np.sqrt(square)))

    def _in_order(self, work: _Fold) -> Iterator[_Done]:
        """Chunks in order; while one is written the threads work on the next."""
        running: deque[Future[_Done]] = deque()
        try:
            for part in work.parts():
                running.append(self._pool.submit(work.chunk, part, work.take()))
                if len(running) > self._threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled():
                    future.exception()


class _Fold:
    """One fold; `chunk` runs on many threads, each with a scratch of its own."""

    def __init__(self, plan: FoldPlan, encryption: EncryptionManager) -> None:
        self._plan = plan
        self._openers = [encryption.opener(update.header) for update in plan.updates]
        self._codecs = [_codec(update) for update in plan.updates]
        self._base = None if plan.base is None else (plan.base, encryption.opener(plan.base.header), _codec(plan.base))
        self._sealer = encryption.sealer(plan.header)
        self._out = WeightCompressor.create("none", lz4="off")
        self._total = float(sum(plan.weights))
        self._free: list[_Scratch] = []

    def parts(self) -> Iterator[ChunkRange]:
        manifest = self._plan.manifest
        return iter_chunks(manifest.elements, manifest.counters, self._plan.header.chunk_elements)

    def take(self) -> _Scratch:
        """A scratch nobody uses; both ends run on the folding thread."""
        if self._free:
            return self._free.pop()
        size = min(self._plan.header.chunk_elements, max(self._plan.manifest.elements, 1))
        return _Scratch(np.empty(size, np.float32), np.empty(size, np.float64))

    def give_back(self, scratch: _Scratch) -> None:
        self._free.append(scratch)

    def chunk(self, part: ChunkRange, scratch: _Scratch) -> _Done:
        square = 0.0
        numbers: Float32s | Int64s
        if part.is_counters:
            numbers = self._counters(part, scratch)
            payload = self._out.encode_counters(numbers)
        else:
            numbers, square = self._values(part, scratch)
            payload = self._encoded(numbers, part)
        sealed = self._sealer.seal(part.index, payload)
        return _Done(numbers, sealed, chunk_digest(sealed), square, scratch)

    def _encoded(self, values_n: Float32s, part: ChunkRange) -> bytes | bytearray:
        try:
            return self._out.encode(values_n)
        except InvalidArgumentError as error:
            raise PreconditionError(
                f"the updates add up to values that are not finite (elements {part.start} to {part.stop - 1})"
            ) from error

    def _values(self, part: ChunkRange, scratch: _Scratch) -> tuple[Float32s, float]:
        out_n, sum_n = scratch.values_n[: part.elements], scratch.sum_n[: part.elements]
        if self._base is None:
            payload = _open(self._plan.updates[0], self._openers[0], self._codecs[0], part, scratch)
            self._codecs[0].decode(payload, part.elements, out_n)
            return out_n, sum_of_squares(out_n)
        sum_n.fill(0.0)
        for update, opener, codec, weight in zip(
            self._plan.updates, self._openers, self._codecs, self._plan.weights, strict=True
        ):
            codec.decode_add(_open(update, opener, codec, part, scratch), sum_n, weight)
        sum_n /= self._total
        source, opener, codec = self._base
        base_n = codec.decode(_open(source, opener, codec, part, scratch), part.elements, out_n)
        self._plan.strategy.step(base_n, sum_n, out_n)
        return out_n, sum_of_squares(sum_n)

    def _counters(self, part: ChunkRange, scratch: _Scratch) -> Int64s:
        """Integers are taken by maximum, over the base too."""
        sources = list(zip(self._plan.updates, self._openers, self._codecs, strict=True))
        if self._base is not None:
            sources.append(self._base)
        highest: Int64s | None = None
        for source, opener, codec in sources:
            counters = codec.decode_counters(_open(source, opener, codec, part, scratch), part.elements)
            highest = counters if highest is None else np.maximum(highest, counters, out=highest)
        if highest is None:
            raise CorruptError("a fold needs at least one update")
        return highest


def _codec(source: SealedChunks) -> WeightCompressor:
    return WeightCompressor.from_wire(source.header.codec, source.header.codec_options)


def _open(
    source: SealedChunks, opener: Opener, codec: WeightCompressor, part: ChunkRange, scratch: _Scratch
) -> memoryview:
    """A chunk's plaintext, in the scratch's buffer."""
    wanted = codec.max_payload_bytes(part)
    if len(scratch.plain) < wanted:
        scratch.plain = bytearray(wanted)
    sealed = source.read(part.index)
    if len(sealed) > wanted + TAG_BYTES:
        raise CorruptError(f"stored chunk {part.index} is longer than its range allows")
    return opener.open_into(part.index, sealed, scratch.plain)
