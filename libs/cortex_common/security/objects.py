"""Sealed objects as data: their header and the keys they are sealed under. No cipher is made here."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex

KEY_BYTES = 32
WRAPPED_BYTES = 80
"""An encapsulated X25519 key of 32 bytes, the key of 32 bytes, a tag of 16."""


class ObjectKind(StrEnum):
    """What a sealed object holds."""

    UPDATE = "update"
    MODEL = "model"
    DELTA = "delta"
    """A model as the change from the version in `base_sha256`."""
    STATE = "state"
    """What an outer optimiser carries to the next round; rests beside a version and never travels."""
    RESIDUAL = "residual"
    """A worker's last update as it was before quantisation; rests on its node and never travels."""
    SHARD = "shard"
    """Part of a data set, under a key of its own."""


@dataclass(frozen=True, slots=True)
class DataKey:
    """A job's AES-256 key of one epoch."""

    key_id: KeyId
    epoch: int
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse keys of another length."""
        if len(self.key) != KEY_BYTES or not self.key_id:
            raise InvalidArgumentError(f"data key: {KEY_BYTES} bytes and an id are needed")


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as it travels: wrapped to the sealing key of the one member that can open it."""

    key_id: KeyId
    epoch: int
    wrapped: bytes

    def __post_init__(self) -> None:
        """Refuse what cannot be one."""
        if len(self.wrapped) != WRAPPED_BYTES or not self.key_id:
            raise InvalidArgumentError(f"data key: an id, and a key wrapped into {WRAPPED_BYTES} bytes, are needed")


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """Everything bound into an object's key. Fields as in the wire's TransferHeader."""

    kind: ObjectKind
    network: str
    job_id: JobId
    round: RoundNumber
    attempt: int
    fence: int
    sender: NodeName
    seat: SeatIndex
    key_id: KeyId
    codec: str
    codec_options: str
    chunk_elements: int
    elements: int
    counters: int
    chunks: int
    manifest_sha256: Sha256Hex
    base_sha256: str = ""
    model_sha256: str = ""
    manifest: bytes = b""
    weight: float = 0.0
    object_id: bytes = b""
    salt: bytes = b""

    def canonical(self) -> bytes:
        """The one text of this header that its key is derived from; the layout is in it by its digest.

        A model's digest is not in it: it is known only once the last chunk has been sealed, and the reader computes it.
        """
        facts = self.to_facts()
        del facts["model_sha256"]
        facts["manifest"] = hashlib.sha256(self.manifest).hexdigest() if self.manifest else ""
        return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()

    def fresh(self) -> ObjectHeader:
        """The same header for a new object: new id, new salt, therefore a new key."""
        return replace(self, object_id=secrets.token_bytes(16), salt=secrets.token_bytes(32))

    def to_facts(self) -> dict[str, Any]:
        """JSON-ready form; floats and bytes as hex."""
        facts = asdict(self)
        facts["weight"] = self.weight.hex()
        for name in ("object_id", "salt"):
            facts[name] = facts[name].hex()
        facts["manifest"] = self.manifest.decode()
        return facts

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> ObjectHeader:
        """Read `to_facts` back.

        Raises:
            CorruptError: not what `to_facts` wrote.
        """
        try:
            values = {item.name: facts[item.name] for item in fields(cls)}
            values["kind"] = ObjectKind(values["kind"])
            values["weight"] = float.fromhex(values["weight"])
            values["object_id"] = bytes.fromhex(values["object_id"])
            values["salt"] = bytes.fromhex(values["salt"])
            values["manifest"] = values["manifest"].encode()
            return cls(**values)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as exc:
            raise CorruptError(f"stored object header is not readable: {exc}") from exc
