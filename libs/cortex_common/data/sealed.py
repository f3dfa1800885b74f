"""Sealed data sets as data: the manifest that their owner signs, and how a shard's bytes are arrays. No key is here.

A shard is its inputs as stored, example after example, then its labels (int64, little-endian). Shard i of a data set
goes to seat i modulo the number of seats.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import Normalisation
from cortex_common.envelope import Envelope
from cortex_common.errors import InvalidArgumentError

MANIFEST_TYPE = "application/vnd.cortex.dataset.v1+json"
MAX_SHARDS = 256
MAX_SHARD_BYTES = 16 << 30
LABEL = np.dtype("<i8")
Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Whole = Annotated[StrictInt, Field(ge=1, lt=1 << 40)]
InputType = Literal["|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(_Part):
    """From stored values to what a network sees: (value / scale - mean) / std."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class ShardFacts(_Part):
    """One shard: how many examples, what its key is derived from, and the digest of its sealed chunks."""

    examples: Whole
    object_id: Hex16
    salt: Hex32
    sha256: Hex32


class DatasetManifest(_Part):
    """What is signed of a data set.

    Attributes:
        name: What its owner calls it.
        input_shape, input_type: Of one input as stored; the type as numpy writes it.
        classes: Labels are 0 to classes - 1.
        scaling: Of inputs.
        key_id: Names its key; that of shard i is `<key_id>-<i>`.
        chunk_bytes: A shard is sealed in chunks of so many bytes, the last one may be shorter.
        signer: Public key of its owner, who has signed this.
        created_at: When it was sealed.
        shards: In order.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
    input_shape: Annotated[tuple[Whole, ...], Field(min_length=1, max_length=16)]
    input_type: InputType
    classes: Whole
    scaling: Scaling = Scaling()
    key_id: Hex16
    chunk_bytes: Annotated[StrictInt, Field(ge=1024, le=4 << 20)]
    signer: Annotated[str, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
    created_at: AwareDatetime
    shards: Annotated[tuple[ShardFacts, ...], Field(min_length=1, max_length=MAX_SHARDS)]

    @property
    def examples(self) -> int:
        """Of all shards."""
        return sum(shard.examples for shard in self.shards)

    @property
    def info(self) -> DatasetInfo:
        """What placement and training need to know."""
        return DatasetInfo(self.name, self.input_shape, self.classes, self.examples)

    def shard_bytes(self, index: int) -> int:
        """Length of a shard before it is sealed."""
        example = math.prod(self.input_shape) * np.dtype(self.input_type).itemsize + LABEL.itemsize
        return self.shards[index].examples * example

    def shard_chunks(self, index: int) -> int:
        """Sealed chunks of a shard."""
        return -(-self.shard_bytes(index) // self.chunk_bytes)

    def to_envelope(self) -> Envelope:
        """The unsigned envelope; the same manifest gives the same bytes."""
        document = self.model_dump(mode="json")
        return Envelope(MANIFEST_TYPE, json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class Described:
    """A manifest as it came in its envelope; whether the signature is good, `security.shards` finds out."""

    manifest: DatasetManifest
    envelope: Envelope

    @cached_property
    def digest(self) -> str:
        """What job files name it by."""
        return hashlib.sha256(self.envelope.payload).hexdigest()

    @property
    def reference(self) -> str:
        """As `data.train` of a job."""
        return f"sealed:{self.manifest.name}@{self.digest}"

    @classmethod
    def of(cls, envelope: Envelope, subject: str = "manifest") -> Self:
        """Read the manifest in an envelope.

        Raises:
            InvalidArgumentError: another kind of payload, or says what is wrong with it.
        """
        if envelope.payload_type != MANIFEST_TYPE:
            kind = envelope.payload_type[:80]
            raise InvalidArgumentError(f"{subject}: payloadType {kind!r} given; allowed: {MANIFEST_TYPE}")
        try:
            manifest = DatasetManifest.model_validate_json(envelope.payload)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidArgumentError(f"{subject}: {place}: {first['msg']}") from None
        if any(manifest.shard_bytes(index) > MAX_SHARD_BYTES for index in range(len(manifest.shards))):
            raise InvalidArgumentError(
                f"{subject}: a shard is larger than {MAX_SHARD_BYTES} bytes; allowed: more shards"
            )
        return cls(manifest, envelope)


@lru_cache(maxsize=64)
def described(text: str) -> Described:
    """The manifest in the text of an envelope: it comes again with each assignment of its job, and is read once.

    Raises:
        InvalidArgumentError: it is none; says why.
    """
    return Described.of(Envelope.from_json(text, "manifest"))


def shards_of_seat(seat: int, seats: int, count: int) -> range:
    """Indices of the shards that a seat trains on."""
    return range(seat, count, seats)


def shard_to_bytes(inputs: NDArray[np.generic], labels: NDArray[np.int64]) -> bytes:
    """A shard before it is sealed."""
    stored = np.ascontiguousarray(inputs).astype(inputs.dtype.newbyteorder("<"), copy=False)
    return stored.tobytes() + np.ascontiguousarray(labels, LABEL).tobytes()


def dataset_of(manifest: DatasetManifest, shards: Sequence[int], view: memoryview) -> Dataset:
    """The examples of some shards, which lie one after another in memory; inputs of several are copied together.

    Raises:
        InvalidArgumentError: the memory has another length, or a label is none of the classes.
    """
    if len(view) < sum(map(manifest.shard_bytes, shards)):
        raise InvalidArgumentError(f"data set {manifest.name}: {len(view)} bytes are too few for its shards {shards}")
    inputs, labels, start = [], [], 0
    for index in shards:
        count, size = manifest.shards[index].examples, manifest.shard_bytes(index)
        cut = start + size - count * LABEL.itemsize
        inputs.append(np.frombuffer(view[start:cut], manifest.input_type).reshape(count, *manifest.input_shape))
        labels.append(np.frombuffer(view[cut : start + size], LABEL).astype(np.int64))
        start += size
    told = np.concatenate(labels)
    if told.min() < 0 or told.max() >= manifest.classes:
        raise InvalidArgumentError(
            f"data set {manifest.name}: labels from {told.min()} to {told.max()}; allowed: 0 to {manifest.classes - 1}"
        )
    stored = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
    scaling = manifest.scaling
    return Dataset(manifest.info, stored, told, Normalisation(scaling.scale, scaling.mean, scaling.std))
