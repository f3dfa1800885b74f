"""What services keep of keys, data sets, people's tokens and those shut out; read as after a restart.

An older `tokens.json` or `denials.json` put back is not found, see docs/threat-model.md: there is nothing earlier here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cortex_common.clock import SystemClock
from cortex_common.data.sealed import Described
from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.ids import JobId, KeyId, NodeName
from cortex_common.network.membership import kept_denials
from cortex_common.security.encryption import DataKey
from cortex_common.security.keyring import FileKeyring, RestingKey
from cortex_common.security.tokens import TokenStore
from cortex_common.storage.checked import to_checked_json
from services.coordinator.datasets import SealedDatasets
from services.coordinator.keys import JobKeys
from services.coordinator.store import StoredDataset, StoredKey
from tests.tampering.damage import Pieces, Subject
from tests.tampering.objects import JOB, KEYS, OTHER_JOB
from tests.tampering.signed import datasets_of_two_signers

_CLOCK = SystemClock()


@dataclass(frozen=True)
class Keyring:
    """A coordinator's file of key-encryption keys, and who opens with them what its database holds."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "keyring.json"

    @property
    def ring(self) -> FileKeyring:
        return FileKeyring(self.file, _CLOCK)

    def rotate(self) -> None:
        """Let a new key take the place of the one before, which is destroyed."""
        ring = self.ring
        before = ring.current
        ring.rotate()
        ring.erase(before)

    @property
    def keys(self) -> JobKeys:
        return JobKeys("cortex", None, self.ring, _CLOCK, lambda *_: None)  # type: ignore[arg-type]

    @property
    def datasets(self) -> SealedDatasets:
        return SealedDatasets("cortex", None, self.keys, self.ring, _CLOCK, 1)  # type: ignore[arg-type]


def key_stored(root: Path) -> Subject:
    """A data key's row in the coordinator's database, and the file of key-encryption keys that it is under."""
    ours, another = Keyring(root), Keyring(root / "another")

    def pieces(job: str = JOB, keyring: Keyring = ours) -> Pieces:
        """The file as it is now; a row under the current key of ours: its key, its ids, its epoch."""
        key = KEYS[job]
        resting = ours.ring.wrap(key.key, ours.keys._context(JobId(job), key.key_id, key.epoch))
        ids = (resting.kek_id.encode(), key.key_id.encode(), str(key.epoch).encode())
        return keyring.file.read_bytes(), resting.wrapped, *ids

    def read(given: Sequence[bytes]) -> Any:
        ours.file.write_bytes(given[0])
        kek_id, key_id, epoch = (piece.decode(errors="replace") for piece in given[2:])
        if not epoch.isdecimal():
            raise CorruptError("the column holds integers")
        stored = StoredKey(KeyId(key_id), int(epoch), RestingKey(kek_id, given[1]), 1e9, "job submitted")
        opened = ours.keys._opened(JobId(JOB), stored).key
        if opened is None:
            raise NotFoundError("it is said to be erased")
        return opened

    earlier = pieces()
    ours.rotate()
    another.rotate()
    return Subject("data key's row and key-encryption keys", pieces(), earlier, pieces(OTHER_JOB, another), read)


def dataset_stored(root: Path) -> Subject:
    """A sealed data set's row in the coordinator's database: its manifest and its key."""
    ours = Keyring(root)

    def pieces(told: Described, key: DataKey) -> Pieces:
        resting = ours.ring.wrap(key.key, ours.datasets._context(told))
        return told.envelope.to_json().encode(), resting.wrapped, resting.kek_id.encode()

    def read(given: Sequence[bytes]) -> Any:
        manifest, wrapped, kek_id = given[0].decode(errors="replace"), given[1], given[2].decode(errors="replace")
        stored = StoredDataset("", "default", manifest, RestingKey(kek_id, wrapped), 1e9, NodeName("ann"))
        known = ours.datasets._opened(stored)
        if not isinstance(known.key, DataKey):
            raise known.key
        return known.told.manifest, known.key

    made = [(told, key) for _, told, key in datasets_of_two_signers(root)]
    earlier, foreign = pieces(*made[1]), pieces(*made[2])
    ours.rotate()
    return Subject("sealed data set's row", pieces(*made[0]), earlier, foreign, read)


def tokens_stored(root: Path) -> Subject:
    """The gateway's tokens and what their hashes are keyed with, as somebody shows one."""

    def store(folder: str) -> tuple[TokenStore, str]:
        made = TokenStore(root / folder / "tokens.json")
        return made, made.create("ann", ["read"], org="north")

    (_, token), _ = store("read"), store("another")

    def pieces(folder: str) -> Pieces:
        return tuple((root / folder / f"tokens.json{ending}").read_bytes() for ending in ("", ".pepper"))

    def read(given: Sequence[bytes]) -> Any:
        for ending, piece in zip(("", ".pepper"), given, strict=True):
            (root / "read" / f"tokens.json{ending}").write_bytes(piece)
        known = TokenStore(root / "read" / "tokens.json")
        return known.verify(token), known.list()

    ours = pieces("read")
    return Subject("API tokens", ours, ours, pieces("another"), read)


def denials_stored(_root: Path) -> Subject:
    """Who was shut out when a node last heard of it."""
    denial = {"identity": "spiffe://cortex/worker/eve", "serials": ["ab12"], "reason": "lost", "at_s": 1e9}
    piece = (to_checked_json({"denials": [denial, denial | {"identity": "spiffe://cortex/worker/mallory"}]}),)
    return Subject("those shut out, as a node remembers", piece, piece, piece, lambda given: kept_denials(given[0]))


def everything_kept(root: Path) -> list[Subject]:
    made = []
    for make in (key_stored, dataset_stored, tokens_stored, denials_stored):
        folder = root / make.__name__
        folder.mkdir(parents=True)
        made.append(make(folder))
    return made
