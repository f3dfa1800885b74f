"""The outer optimiser's state: a sealed object beside the version it belongs to, read for the next round.

Legend: n elements of one chunk, S state vectors, R = 1 where there is a residual, otherwise 0. Chunk i holds the
vectors' values for the model's chunk i, one vector after the other, the residual last. The strategy, its options, S and
R are the header's layout, bound into the object's key. The residual is what the delta of a version left out of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import ChunkRange, Float32s, chunk_count
from services.aggregator.sealed import Plaintext, SealedChunks, SealedSource
from services.aggregator.strategies import OuterStrategy


@dataclass(frozen=True, slots=True)
class StatePlan:
    """The state a fold writes, and the one it reads. `former` is None at a job's first step."""

    header: ObjectHeader | None
    """Of the new state, fresh; None: the strategy keeps none, and no residual is left."""
    former: SealedChunks | None


def state_header(version: ObjectHeader, strategy: OuterStrategy, *, has_residual: bool = False) -> ObjectHeader | None:
    """The header of the state beside a new version; None when there is nothing to keep."""
    if not (strategy.slots or has_residual) or not version.elements:
        return None
    chunks = chunk_count(version.elements, 0, version.chunk_elements)
    layout = _canonical({**json.loads(strategy.layout), "residual": True}) if has_residual else strategy.layout
    kept = replace(version, kind=ObjectKind.STATE, counters=0, chunks=chunks, model_sha256="", manifest=layout)
    return kept.fresh()


def check_state(base: ObjectHeader, state: ObjectHeader | None, strategy: OuterStrategy, chunk_elements: int) -> None:
    """A round goes on with the strategy, the options and the chunks that made its base.

    Args:
        base: Header of the version the round starts from; without a state only version 0 is free to begin with any.
        state: Header of the state beside it.
        strategy: The round's.
        chunk_elements: The round's.

    Raises:
        PreconditionError: says what differs.
        CorruptError: the state is not that of the version.
    """
    what = f"round {base.round} of job {base.job_id}"
    if base.chunk_elements != chunk_elements:
        raise PreconditionError(
            f"the version of {what} has chunks of {base.chunk_elements} elements, not {chunk_elements}; "
            "a job keeps the size it began with"
        )
    wanted = strategy.layout if strategy.slots and base.elements else None
    kept = _strategy_layout(state)
    if base.round and kept != wanted:
        raise PreconditionError(
            f"the version of {what} was made with {_strategy(kept)}, this round asks for {_strategy(wanted)}; "
            "a job keeps its strategy and options, another strategy is a new job (init_from takes the weights along)"
        )
    shape = ("elements", "chunk_elements", "manifest_sha256", "job_id", "round", "attempt")
    if state is not None and any(getattr(state, name) != getattr(base, name) for name in shape):
        raise CorruptError(f"the outer state beside the version of {what} belongs to another version")


def _strategy_layout(state: ObjectHeader | None) -> bytes | None:
    """The layout of the strategy's own vectors; None if there are none."""
    if state is None:
        return None
    facts = json.loads(state.manifest)
    facts.pop("residual", None)
    return _canonical(facts) if facts["slots"] else None


def _has_residual(header: ObjectHeader | None) -> bool:
    return header is not None and json.loads(header.manifest).get("residual") is True


def _canonical(facts: object) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def _strategy(layout: bytes | None) -> str:
    return f"the outer state {layout.decode()}" if layout else "no outer state"


class StateFold:
    """Reads, and seals, a state chunk by chunk; threads may share it."""

    def __init__(self, plan: StatePlan, strategy: OuterStrategy, encryption: EncryptionManager) -> None:
        self._strategy = strategy
        self._former = None if plan.former is None else SealedSource(plan.former, encryption)
        self._read_rows = strategy.slots + _has_residual(plan.former.header if plan.former else None)
        self._kept_rows = strategy.slots + _has_residual(plan.header)
        self.rows = max(self._read_rows, self._kept_rows)
        """Vectors in memory, S + R; R where there was a residual or one is kept."""
        self._sealer = encryption.sealer(plan.header) if plan.header is not None else None
        self._codec = WeightCompressor.create("none", lz4="off")

    def read(self, part: ChunkRange, room: Float32s, plain: Plaintext) -> Float32s:
        """The state of a range as it was, shape (S + R, n), in `room`, which is flat and at least as long."""
        flat = room[: self.rows * part.elements]
        state = flat.reshape(self.rows, part.elements)
        if self._former is None:
            self._strategy.begin(state[: self._strategy.slots])
            state[self._strategy.slots :] = 0
        else:
            read = self._read_rows * part.elements
            self._former.values(ChunkRange(part.index, 0, read), flat[:read], plain)
            state[self._read_rows :] = 0
        return state

    def residual(self, state: Float32s) -> Float32s | None:
        """The vector of the residual in what `read` gave, as a view; None if there is none."""
        return state[-1] if self.rows > self._strategy.slots else None

    def seal(self, part: ChunkRange, state: Float32s) -> bytes:
        """The sealed chunk of the new state; nothing, if none is kept.

        Raises:
            PreconditionError: a value is not finite.
        """
        if self._sealer is None:
            return b""
        try:
            payload = self._codec.encode(state[: self._kept_rows].reshape(-1))
        except InvalidArgumentError as error:
            raise PreconditionError(
                f"strategy {self._strategy.name}: its state is no longer finite "
                f"(elements {part.start} to {part.stop - 1})"
            ) from error
        return self._sealer.seal(part.index, payload)
