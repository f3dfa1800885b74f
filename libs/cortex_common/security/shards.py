"""Sealing data sets and opening their shards. Each shard has its own key, which its data set's key gives."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cortex_common.data.loading import Dataset
from cortex_common.data.partition import Indices
from cortex_common.data.sealed import MANIFEST_TYPE, DatasetManifest, Described, shard_to_bytes
from cortex_common.envelope import Envelope
from cortex_common.errors import AlreadyExistsError, CorruptError, ForbiddenError, InvalidArgumentError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import TAG_BYTES, DataKey, EncryptionManager, Opener, derive_key
from cortex_common.security.objects import ObjectHeader, ObjectKind
from cortex_common.security.signing import PublicKey, SigningKey
from cortex_common.storage.durable import make_directory, write_durably

MANIFEST_FILE = "manifest.json"
CHUNK_BYTES = 1 << 20
_EPOCH = 1


def header_of(manifest: DatasetManifest, index: int) -> ObjectHeader:
    """What the key of a shard is bound to, by the manifest alone: one that is moved or changed does not open."""
    shard = manifest.shards[index]
    return ObjectHeader(
        kind=ObjectKind.SHARD,
        network="",
        job_id=JobId(manifest.name),
        round=RoundNumber(index),
        attempt=0,
        fence=0,
        sender=NodeName(""),
        seat=SeatIndex(index),
        key_id=KeyId(f"{manifest.key_id}-{index}"),
        codec="none",
        codec_options="",
        chunk_elements=manifest.chunk_bytes,
        elements=manifest.shard_bytes(index),
        counters=0,
        chunks=manifest.shard_chunks(index),
        manifest_sha256=Sha256Hex(""),
        model_sha256=shard.sha256,
        weight=float(shard.examples),
        object_id=bytes.fromhex(shard.object_id),
        salt=bytes.fromhex(shard.salt),
    )


def check_signature(told: Described) -> None:
    """Believe a manifest that the owner it names has signed.

    Raises:
        ForbiddenError: there is no such signature.
    """
    signer = PublicKey.parse(told.manifest.signer)
    if not signer.has_signed(told.envelope):
        raise ForbiddenError(
            f"manifest of data set {told.manifest.name}: not signed by {told.manifest.signer}, whose it says it is"
        )


def dataset_key(manifest: DatasetManifest, key: bytes) -> DataKey:
    """The key of a data set. InvalidArgumentError: another length."""
    return DataKey(KeyId(manifest.key_id), _EPOCH, key)


def shard_key(key: DataKey, index: int) -> DataKey:
    """The key of one shard."""
    return derive_key(key, index)


def seal_dataset(
    name: str,
    dataset: Dataset,
    parts: Sequence[Indices],
    signer: SigningKey,
    folder: Path,
    now: datetime,
    on_shard: Callable[[int], None] = lambda _: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Described, DataKey]:
    """Write the sealed shards of a data set and its signed manifest; gives the manifest and the key, which is nowhere.

    Args:
        name: Of the data set.
        dataset: What is sealed, in whatever way its values are stored.
        parts: The examples of each shard.
        signer: The owner's key.
        folder: A new one, or one that is empty.
        now: For the manifest.
        on_shard: Told of each that is written.
        chunk_bytes: A shard is sealed in chunks of so many bytes.

    Raises:
        AlreadyExistsError: there is something in the folder.
        InvalidArgumentError: something that a manifest cannot hold.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyExistsError(f"{folder} is not empty; allowed: a new folder for each data set")
    make_directory(folder)
    key = EncryptionManager.new_data_key(_EPOCH)
    draft = _draft(name, dataset, parts, signer, key, now).model_copy(update={"chunk_bytes": chunk_bytes})
    shards = []
    for index, part in enumerate(parts):
        plain = shard_to_bytes(_stored(dataset, part), dataset.labels[part])
        digest = hashlib.sha256()
        with (folder / shard_file(index)).open("xb") as file:
            for sealed in _sealed_chunks(draft, index, key, plain):
                file.write(sealed)
                digest.update(sealed)
        shards.append(draft.shards[index].model_copy(update={"sha256": digest.hexdigest()}))
        on_shard(index)
    envelope = signer.sign(draft.model_copy(update={"shards": tuple(shards)}).to_envelope())
    write_durably(folder / MANIFEST_FILE, envelope.to_json().encode())
    return Described.of(envelope), key


def shard_file(index: int) -> str:
    """Name of a shard's file beside its manifest."""
    return f"{index:04}.shard"


def sealed_size(header: ObjectHeader, index: int) -> int:
    """Length of a sealed chunk of a shard."""
    return sealed_bytes(header, index + 1) - sealed_bytes(header, index)


def sealed_bytes(header: ObjectHeader, chunks: int) -> int:
    """Length of the first sealed chunks of a shard together: where the next one begins in its file."""
    return min(chunks * header.chunk_elements, header.elements) + chunks * TAG_BYTES


class ShardIntake:
    """Opens the chunks of one shard, in order, into its caller's memory. Nothing of it counts before `finish`."""

    def __init__(self, manifest: DatasetManifest, index: int, key: DataKey, target: memoryview) -> None:
        """Begin.

        Raises:
            InvalidArgumentError: the key is another shard's, or the memory has another length.
        """
        self.header = header_of(manifest, index)
        if key.key_id != self.header.key_id or len(target) != self.header.elements:
            raise InvalidArgumentError(f"shard {index} of data set {manifest.name}: key {key.key_id} is not its key")
        self._opener: Opener = EncryptionManager(key).opener(self.header)
        self._digest = hashlib.sha256()
        self._target = target
        self._scratch = bytearray(manifest.chunk_bytes)
        self.next = 0

    def take(self, index: int, sealed: bytes | memoryview) -> None:
        """Open the next chunk.

        Raises:
            CorruptError: it is not the one that is due, was changed, or is of another shard.
        """
        if index != self.next or index >= self.header.chunks:
            raise CorruptError(f"{self._what}: chunk {index} came where chunk {self.next} was due")
        self._digest.update(sealed)
        plain = self._opener.open_into(index, sealed, self._scratch)
        start = index * self.header.chunk_elements
        if len(plain) != min(self.header.chunk_elements, self.header.elements - start):
            raise CorruptError(f"{self._what}: chunk {index} has {len(plain)} bytes")
        self._target[start : start + len(plain)] = plain
        self.next += 1

    def finish(self) -> None:
        """All of it is there, and is what the manifest says.

        Raises:
            CorruptError: it is not.
        """
        self._scratch[:] = bytes(len(self._scratch))
        if self.next != self.header.chunks:
            raise CorruptError(f"{self._what}: {self.next} of {self.header.chunks} chunks came")
        if self._digest.hexdigest() != self.header.model_sha256:
            raise CorruptError(f"{self._what}: its digest is not the one in the manifest")

    @property
    def _what(self) -> str:
        return f"shard {self.header.round} of data set {self.header.job_id}"


def _draft(
    name: str, dataset: Dataset, parts: Sequence[Indices], signer: SigningKey, key: DataKey, now: datetime
) -> DatasetManifest:
    """The manifest before the shards' digests are known."""
    scaling = dataset.normalisation
    fresh = [
        {"examples": len(part), "object_id": secrets.token_hex(16), "salt": secrets.token_hex(32), "sha256": "0" * 64}
        for part in parts
    ]
    document = {
        "name": name,
        "input_shape": dataset.info.input_shape,
        "input_type": _stored(dataset, parts[0][:1]).dtype.str,
        "classes": dataset.info.classes,
        "scaling": {"scale": scaling.scale, "mean": scaling.mean, "std": scaling.std},
        "key_id": key.key_id,
        "chunk_bytes": CHUNK_BYTES,
        "signer": str(signer.public),
        "created_at": now.isoformat(),
        "shards": fresh,
    }
    return Described.of(Envelope(MANIFEST_TYPE, json.dumps(document).encode()), f"data set {name}").manifest


def _stored(dataset: Dataset, part: Indices) -> NDArray[Any]:
    """Inputs as they are sealed: little-endian numbers; truth values as bytes."""
    inputs = dataset.inputs[part]
    return inputs.astype("|u1") if inputs.dtype.kind == "b" else inputs.astype(inputs.dtype.newbyteorder("<"))


def _sealed_chunks(manifest: DatasetManifest, index: int, key: DataKey, plain: bytes) -> Iterator[bytes]:
    header, view = header_of(manifest, index), memoryview(plain)
    sealer = EncryptionManager(shard_key(key, index)).sealer(header)
    for chunk in range(header.chunks):
        start = chunk * header.chunk_elements
        yield sealer.seal(chunk, view[start : start + header.chunk_elements])
