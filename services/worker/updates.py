"""An update: its header, and its chunks, made when they are due. Legend: n elements of one chunk."""

from __future__ import annotations

import numpy as np

from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.ids import NodeName
from cortex_common.network.work import Assignment
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import ChunkRange, Manifest, chunk_count
from services.worker.residuals import Feedback, Kept, ResidualStore, kept_header
from services.worker.workbench import Workbench


class DeltaEncoder:
    """Payloads of the update's chunks: result - base, never more than a chunk of it in memory.

    Args:
        bench: Holds both arenas.
        codec: Of the round.
        seed: What tells this update from all others; with the chunk's index the seed of stochastic rounding.
        is_first: Round 0: the base is zero.
        feedback: Adds what earlier updates left out; None without error feedback.
    """

    def __init__(
        self,
        bench: Workbench,
        codec: WeightCompressor,
        seed: tuple[int, ...] = (),
        *,
        is_first: bool,
        feedback: Feedback | None = None,
    ) -> None:
        self._base = bench.base
        self._result = bench.result
        self._codec = codec
        self._seed = feedback.kept.seed if feedback else seed
        self._is_first = is_first
        self._feedback = feedback
        self._scratch = np.empty(0, np.float32)
        self._room = bytearray()

    def encode(self, chunk: ChunkRange) -> bytes | bytearray | memoryview:
        """The payload of a range, good until the next call; counters travel as they are."""
        if chunk.is_counters:
            return self._codec.encode_counters(self._result.counters)
        result = self._result.values[chunk.start : chunk.stop]
        if len(self._room) < (most := self._codec.max_payload_bytes(chunk)):
            self._room = bytearray(most)
        if self._is_first:
            return self._codec.encode_into(result, self._room)
        if self._scratch.size < chunk.elements:
            self._scratch = np.empty(chunk.elements, np.float32)
        delta_n = self._scratch[: chunk.elements]
        np.subtract(result, self._base.values[chunk.start : chunk.stop], out=delta_n)
        if self._feedback is not None:
            self._feedback.apply(chunk, delta_n)
        return self._codec.encode_into(delta_n, self._room, seed=rounding_seed(*self._seed, chunk.index))


def codec_of(assignment: Assignment) -> WeightCompressor:
    """How the update travels; the first version as it is."""
    return WeightCompressor.create(*assignment.spec.upload_of(assignment.round), assignment.spec.compression.lz4)


def download_codec_of(assignment: Assignment) -> WeightCompressor:
    """How versions travel that are deltas."""
    download = assignment.spec.compression.download
    return WeightCompressor.create(download.codec, download.options)


def seed_of(assignment: Assignment) -> tuple[int, ...]:
    """What tells this update from all others."""
    return (assignment.spec.training.seed, assignment.round, assignment.seat)


def feedback_of(
    bench: Workbench,
    assignment: Assignment,
    header: ObjectHeader,
    codec: WeightCompressor,
    encryption: EncryptionManager,
) -> Feedback:
    """Error feedback for this update; reads the disk.

    Raises:
        FeedbackLostError: what was kept cannot be read.
    """
    resting = kept_header(header)
    blob = f"{assignment.round}-{resting.object_id.hex()[:8]}.blob"
    kept = Kept(assignment.round, codec.codec, codec.options_json, seed_of(assignment), resting, blob)
    store = ResidualStore(bench.residuals, assignment.job_id)
    return Feedback(store, kept, assignment.included_round, assignment.base_seats, encryption)


def header_of(
    assignment: Assignment, manifest: Manifest, codec: WeightCompressor, network: str, sender: NodeName, weight: float
) -> ObjectHeader:
    """The header of a new object."""
    is_first = not assignment.base_sha256
    return ObjectHeader(
        kind=ObjectKind.UPDATE,
        network=network,
        job_id=assignment.transfer_id,
        round=assignment.round,
        attempt=assignment.attempt,
        fence=assignment.fence,
        sender=sender,
        seat=assignment.seat,
        key_id=assignment.data_key.key_id,
        codec=codec.codec,
        codec_options=codec.options_json,
        chunk_elements=assignment.chunk_elements,
        elements=manifest.elements,
        counters=manifest.counters,
        chunks=chunk_count(manifest.elements, manifest.counters, assignment.chunk_elements),
        manifest_sha256=manifest.sha256,
        base_sha256=assignment.base_sha256,
        manifest=manifest.to_json() if is_first else b"",
        weight=weight,
    ).fresh()
