"""Small objects of every kind, sealed as a job seals them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cortex_common.codec import WeightCompressor
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import Arena, Manifest, TensorKind, chunk_count, chunk_ranges, model_sha256

CHUNK = 256
MANIFEST = Manifest.of([("w", (8, 70), TensorKind.TRAINABLE), ("b", (30,), TensorKind.TRAINABLE)])
JOB, OTHER_JOB = "job-1", "job-2"
WORKER = "w1"
KEYS = {JOB: DataKey("key-1", 1, bytes(range(32))), OTHER_JOB: DataKey("key-2", 1, bytes(range(32, 64)))}
CRYPT = EncryptionManager(*KEYS.values())
PARTS = chunk_ranges(MANIFEST.elements, MANIFEST.counters, CHUNK)


def arena_of(seed: int) -> Arena:
    """Numbers."""
    return Arena(
        np.random.default_rng(seed).standard_normal(MANIFEST.elements).astype(np.float32), np.zeros(0, np.int64)
    )


def header_of(kind: ObjectKind, job: str = JOB, number: int = 2, codec: str = "none") -> ObjectHeader:
    """A fresh header of an object of a job's round, of the layout MANIFEST."""
    compressor = WeightCompressor.create(codec)
    return ObjectHeader(
        kind=kind,
        network="cortex",
        job_id=job,
        round=number,
        attempt=0,
        fence=1,
        sender=WORKER,
        seat=0,
        key_id=KEYS[job].key_id,
        codec=compressor.codec,
        codec_options=compressor.options_json,
        chunk_elements=CHUNK,
        elements=MANIFEST.elements,
        counters=MANIFEST.counters,
        chunks=chunk_count(MANIFEST.elements, MANIFEST.counters, CHUNK),
        manifest_sha256=MANIFEST.sha256,
        base_sha256="0" * 64,
        weight=1.5,
    ).fresh()


def sealed(header: ObjectHeader, arena: Arena) -> list[bytes]:
    """The object's chunks."""
    sealer, codec = CRYPT.sealer(header), WeightCompressor.from_wire(header.codec, header.codec_options)
    return [sealer.seal(part.index, codec.encode(arena.values[part.start : part.stop])) for part in PARTS]


def model(job: str = JOB, number: int = 2, seed: int = 1) -> tuple[ObjectHeader, list[bytes]]:
    """A version, whole."""
    arena = arena_of(seed)
    header = replace(header_of(ObjectKind.MODEL, job, number), manifest=MANIFEST.to_json())
    return replace(header, model_sha256=model_sha256(MANIFEST, arena)), sealed(header, arena)


def delta(job: str = JOB, number: int = 2, seed: int = 1) -> tuple[ObjectHeader, list[bytes]]:
    """The same version as the exact change from BASE."""
    base, arena = arena_of(0), arena_of(seed)
    change = Arena(arena.values - base.values, arena.counters)
    given = Arena(base.values + change.values, arena.counters)
    header = replace(
        header_of(ObjectKind.DELTA, job, number),
        manifest=MANIFEST.to_json(),
        base_sha256=model_sha256(MANIFEST, base),
    )
    return replace(header, model_sha256=model_sha256(MANIFEST, given)), sealed(header, change)
