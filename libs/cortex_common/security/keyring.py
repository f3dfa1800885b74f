"""Key-encryption keys: data keys rest in the coordinator's database only wrapped under one of these.

`KeyEncryption` is what the coordinator needs of them. `FileKeyring` keeps them in one file that only its owner can
read; a hardware module or a key-management service is another implementation.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.encryption import unwrap_under, wrap_under
from cortex_common.security.objects import KEY_BYTES
from cortex_common.storage.durable import make_directory, write_durably

_OTHERS = 0o027


@dataclass(frozen=True, slots=True)
class RestingKey:
    """A secret as it rests: wrapped under the key-encryption key that is named."""

    kek_id: str
    wrapped: bytes


class KeyEncryption(Protocol):
    """Wraps secrets at rest. `context` says what a secret is for: under another one it does not open. Calls block."""

    @property
    def current(self) -> str:
        """Id of the key that wraps from now on."""

    def wrap(self, secret: bytes, context: bytes) -> RestingKey:
        """Wrap under the current key."""

    def unwrap(self, resting: RestingKey, context: bytes) -> bytes:
        """Open what any key of these has wrapped.

        Raises:
            NotFoundError: the key that it names is not here.
            CorruptError: changed, or of another context.
        """


@dataclass(frozen=True, slots=True)
class _Keys:
    current: str
    keys: dict[str, bytes] = field(repr=False)


class FileKeyring:
    """Key-encryption keys in a 0600 file; made with a first key where there is none. The default KeyEncryption."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            CorruptError: it is damaged.
            PreconditionError: others may read it.
        """
        self._path = path
        make_directory(path.parent)
        self._keys = self._read() if path.exists() else self._with_new(_Keys("", {}))

    @property
    def current(self) -> str:
        """Id of the key that wraps from now on."""
        return self._keys.current

    def wrap(self, secret: bytes, context: bytes) -> RestingKey:
        """Wrap under the current key."""
        current = self._keys.current
        return RestingKey(current, wrap_under(self._keys.keys[current], secret, context))

    def unwrap(self, resting: RestingKey, context: bytes) -> bytes:
        """Open what any key of these has wrapped.

        Raises:
            NotFoundError: the key that it names is not here.
            CorruptError: changed, or of another context.
        """
        key = self._keys.keys.get(resting.kek_id)
        if key is None:
            raise NotFoundError(f"key-encryption key {resting.kek_id!r} is not in {self._path}")
        return unwrap_under(key, resting.wrapped, context)

    def _with_new(self, before: _Keys) -> _Keys:
        """One more key, the current one from now on; on the disk before it is used."""
        made = _Keys(f"kek-{secrets.token_hex(6)}", dict(before.keys))
        made.keys[made.current] = secrets.token_bytes(KEY_BYTES)
        document = {"current": made.current, "keys": {name: key.hex() for name, key in made.keys.items()}}
        write_durably(self._path, json.dumps(document, indent=1).encode(), mode=0o600)
        return made

    def _read(self) -> _Keys:
        mode = self._path.stat().st_mode
        if mode & _OTHERS:
            raise PreconditionError(
                f"{self._path} has mode {mode & 0o777:o}: others may read or change it; allowed: 600, "
                "or 640 for a mounted secret"
            )
        try:
            document = json.loads(self._path.read_bytes())
            keys = {str(name): bytes.fromhex(key) for name, key in document["keys"].items()}
            current = str(document["current"])
            if current not in keys or any(len(key) != KEY_BYTES for key in keys.values()):
                raise ValueError("the current key is not among them, or one has another length")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"key-encryption keys: {self._path} is damaged: {error}") from None
        return _Keys(current, keys)
