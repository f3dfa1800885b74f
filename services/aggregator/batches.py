"""BatchProcessor: one pass over many sealed updates, chunk by chunk. Legend: n elements of one chunk, K updates.

Memory is a few chunks per thread, whatever the model's size and the number of updates. Updates are added in the order
given, in float64; so the result does not depend on the order of arrival or on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cortex_common.codec import WeightCompressor
from cortex_common.errors import InvalidArgumentError, PreconditionError
from cortex_common.ids import Sha256Hex
from cortex_common.security.encryption import TAG_BYTES, EncryptionManager, ObjectHeader
from cortex_common.storage import BlobWriter
from cortex_common.tensors import ChunkRange, Float32s, Int64s, Manifest, ModelDigest, iter_chunks
from cortex_common.transfer.content import chunk_digest, content_digest
from cortex_common.validation import sum_of_squares
from services.aggregator.deltas import DeltaFold
from services.aggregator.means import MeanOfUpdates
from services.aggregator.sealed import Plaintext, SealedChunks, SealedSource
from services.aggregator.states import StateFold, StatePlan
from services.aggregator.strategies import OuterStrategy

_FOLDS = 4
_NO_STATE: Float32s = np.empty((0, 0), np.float32)


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
    state: StatePlan | None = None
    """Of the outer optimiser, when there is one to read or to write; never in round 0."""
    delta: ObjectHeader | None = None
    """Of the delta that the version travels as, fresh; never in round 0, and never without a state."""


@dataclass(frozen=True, slots=True)
class Written:
    """Facts of a sealed blob."""

    sizes: tuple[int, ...]
    content_sha256: Sha256Hex


@dataclass(frozen=True, slots=True)
class FoldResult:
    """What came out: the version's header with its digest, and facts of the sealed blobs."""

    header: ObjectHeader
    values: Written
    state: Written
    delta: Written
    update_norm: float


@dataclass(frozen=True, slots=True)
class FoldTargets:
    """Where sealed chunks go: the version's, its outer state's, its delta's."""

    values: BlobWriter
    state: BlobWriter | None = None
    delta: BlobWriter | None = None


@dataclass(slots=True)
class _Scratch:
    """Buffers of one chunk in work, held until it is written; `state` holds the state vectors one after the other."""

    values_n: Float32s
    target_n: Float32s
    sum_n: NDArray[np.float64]
    state: Float32s
    payload: bytearray
    sealed: bytearray
    plain: Plaintext = field(default_factory=Plaintext)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """One chunk of everything a fold writes."""

    values: bytes | memoryview
    state: bytes
    delta: bytes


@dataclass(frozen=True, slots=True)
class _Done:
    """One chunk of the new version."""

    numbers: Float32s | Int64s
    sealed: _Sealed
    square: float
    scratch: _Scratch


class _Output:
    """Writes the sealed chunks of one object in order."""

    def __init__(self, target: BlobWriter | None) -> None:
        self._target = target
        self._sizes: list[int] = []
        self._digests: list[bytes] = []

    def take(self, sealed: bytes | memoryview) -> None:
        if self._target is not None and sealed:
            self._target.write(sealed)
            self._sizes.append(len(sealed))
            self._digests.append(chunk_digest(sealed))

    def written(self) -> Written:
        return Written(tuple(self._sizes), Sha256Hex(content_digest(self._digests).hex()))


class BatchProcessor:
    """Folds updates into a version with a fixed number of threads.

    Sealed chunks come from whatever has `read(index)`, and go to whatever has `write(data)`:

    >>> from cortex import BatchProcessor
    >>> from services.aggregator.batches import FoldPlan, FoldTargets
    >>> from services.aggregator.strategies import create_strategy
    >>> average = create_strategy("fedavg", "{}")
    >>> processor = BatchProcessor(threads=2)
    >>> plan = FoldPlan(manifest, base, [update_1, update_2], [1.0, 3.0], average, target.header)
    >>> result = processor.fold(plan, encryption, FoldTargets(target))
    >>> processor.close()
    >>> result.header.model_sha256 == model_sha256_of(base_numbers + 0.25 * numbers_1 + 0.75 * numbers_2)
    True
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fold")
        self.leads = ThreadPoolExecutor(_FOLDS, thread_name_prefix="lead")
        """Threads to call `fold` on: so many folds at a time, the others wait."""

    def close(self) -> None:
        """End the threads."""
        self.leads.shutdown()
        self._pool.shutdown()

    def fold(self, plan: FoldPlan, encryption: EncryptionManager, targets: FoldTargets) -> FoldResult:
        """Write the next version's sealed chunks, its outer state's, and its delta's.

        Raises:
            CorruptError: an update, the base or its state does not open.
            PreconditionError: the result is not finite.
        """
        work = _Fold(plan, encryption)
        digest = ModelDigest(plan.manifest)
        values, state, delta = _Output(targets.values), _Output(targets.state), _Output(targets.delta)
        square = 0.0
        for done in self._in_order(work):
            digest.update(done.numbers)
            values.take(done.sealed.values)
            state.take(done.sealed.state)
            delta.take(done.sealed.delta)
            square += done.square
            work.give_back(done.scratch)
        header = replace(plan.header, model_sha256=digest.hexdigest())
        return FoldResult(header, values.written(), state.written(), delta.written(), float(np.sqrt(square)))

    def _in_order(self, work: _Fold) -> Iterator[_Done]:
        """Chunks in order; while one is written the threads work on the next."""
        running: deque[Future[_Done]] = deque()
        parts = list(work.parts())
        if len(parts) == 1:
            yield work.chunk(parts[0], work.take())
            return
        try:
            for part in parts:
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
        self._first = SealedSource(plan.updates[0], encryption)
        self._updates = MeanOfUpdates(plan.updates, plan.weights, encryption)
        self._base = None if plan.base is None else SealedSource(plan.base, encryption)
        self._state = None if plan.state is None else StateFold(plan.state, plan.strategy, encryption)
        self._delta = None if plan.delta is None else DeltaFold(plan.delta, encryption)
        self._sealer = encryption.sealer(plan.header)
        self._out = WeightCompressor.create("none", lz4="off")
        self._free: list[_Scratch] = []

    def parts(self) -> Iterator[ChunkRange]:
        manifest = self._plan.manifest
        return iter_chunks(manifest.elements, manifest.counters, self._plan.header.chunk_elements)

    def take(self) -> _Scratch:
        """A scratch nobody uses; both ends run on the folding thread."""
        if self._free:
            return self._free.pop()
        size = min(self._plan.header.chunk_elements, max(self._plan.manifest.elements, 1))
        rows = self._state.rows if self._state else 0
        return _Scratch(
            np.empty(size, np.float32),
            np.empty(size if self._delta else 0, np.float32),
            np.empty(size, np.float64),
            np.empty(rows * size, np.float32),
            bytearray(most := self._out.max_payload_bytes(ChunkRange(0, 0, size))),
            bytearray(most + TAG_BYTES),
        )

    def give_back(self, scratch: _Scratch) -> None:
        self._free.append(scratch)

    def chunk(self, part: ChunkRange, scratch: _Scratch) -> _Done:
        if part.is_counters:
            numbers = self._counters(part, scratch)
            values = self._sealer.seal(part.index, self._out.encode_counters(numbers))
            delta = self._delta.counters(part, numbers) if self._delta else b""
            return _Done(numbers, _Sealed(values, b"", delta), 0.0, scratch)
        out_n, square = scratch.values_n[: part.elements], 0.0
        state = delta = b""
        try:
            if self._base is None:
                self._first.values(part, out_n, scratch.plain)
                square = sum_of_squares(out_n)
            else:
                square, state, delta = self._step(part, out_n, scratch)
            payload = self._out.encode_into(out_n, scratch.payload)
        except InvalidArgumentError as error:
            raise PreconditionError(
                f"the updates add up to values that are not finite (elements {part.start} to {part.stop - 1})"
            ) from error
        sealed = memoryview(scratch.sealed)[: len(payload) + TAG_BYTES]
        self._sealer.seal_into(part.index, payload, sealed)
        return _Done(out_n, _Sealed(sealed, state, delta), square, scratch)

    def _step(self, part: ChunkRange, out_n: Float32s, scratch: _Scratch) -> tuple[float, bytes, bytes]:
        """Write the next values; the squares of the mean summed, the sealed state, the sealed delta."""
        assert self._base is not None  # noqa: S101  only round 0 has none
        mean_n = scratch.sum_n[: part.elements]
        self._updates.mean(part, mean_n, scratch.plain)
        self._base.values(part, out_n, scratch.plain)
        square = sum_of_squares(mean_n)
        if self._state is None:
            self._plan.strategy.step(out_n, mean_n, _NO_STATE, out_n)
            return square, b"", b""
        state = self._state.read(part, scratch.state, scratch.plain)
        target_n = out_n if self._delta is None else scratch.target_n[: part.elements]
        self._plan.strategy.step(out_n, mean_n, state, target_n)
        delta, residual_n = b"", self._state.residual(state)
        if residual_n is not None:
            target_n += residual_n
            if self._delta is not None:
                delta = self._delta.apply(part, out_n, target_n, residual_n)
        return square, self._state.seal(part, state), delta

    def _counters(self, part: ChunkRange, scratch: _Scratch) -> Int64s:
        """Integers are taken by maximum, over the base too."""
        highest = self._updates.counters(part, scratch.plain)
        if self._base is None:
            return highest
        return np.maximum(highest, self._base.counters(part, scratch.plain), out=highest)
