"""Key-encryption keys: data keys rest in the coordinator's database only wrapped under one of these.

`KeyEncryption` is what the coordinator needs of them. `FileKeyring` keeps them in one file that only its owner can
read; a hardware module or a key-management service is another implementation.
"""

from __future__ import annotations

import fcntl
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, NotFoundError, PreconditionError
from cortex_common.security.encryption import unwrap_under, wrap_under
from cortex_common.security.objects import KEY_BYTES
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.storage.durable import make_directory, open_new, write_durably

KEK_PREFIX = "kek-"
_OTHERS = 0o027
_ID = re.compile(r"kek-(?P<made>\d{8}T\d{12}Z)-[0-9a-f]{8}")
_MADE = "%Y%m%dT%H%M%S%fZ"


@dataclass(frozen=True, slots=True)
class RestingKey:
    """A secret as it rests: wrapped under the key-encryption key that is named."""

    kek_id: str
    wrapped: bytes


class KeyEncryption(Protocol):
    """Wraps secrets at rest. `context` says what a secret is for: under another one it does not open.

    Calls block. Any may raise UnavailableError: whoever holds the keys is away, and may be asked again.
    """

    @property
    def ids(self) -> tuple[str, ...]:
        """Every key there is, oldest first; they say when they were made, see `made_s`."""

    @property
    def current(self) -> str:
        """Id of the key that wraps from now on."""

    def rotate(self) -> str:
        """Make another key, the current one from now on; kept for good when this returns."""

    def erase(self, kek_id: str) -> None:
        """Destroy a key that is not the current one; what is still wrapped under it is lost.

        Raises:
            PreconditionError: it is the current one.
            NotFoundError: there is no such key.
        """

    def wrap(self, secret: bytes, context: bytes) -> RestingKey:
        """Wrap under the current key."""

    def unwrap(self, resting: RestingKey, context: bytes) -> bytes:
        """Open what any key of these has wrapped.

        Raises:
            NotFoundError: the key that it names is not here.
            CorruptError: changed, or of another context.
        """


def new_kek_id(now_s: float, others: Iterable[str] = ()) -> str:
    """A new id; it says when it was made, and sorts by that: after the others, also when a clock was set back."""
    latest_s = max((made_s(other) or 0.0 for other in others), default=0.0)
    moment = datetime.fromtimestamp(max(now_s, latest_s + 1e-5), UTC)
    return f"{KEK_PREFIX}{moment.strftime(_MADE)}-{secrets.token_hex(4)}"


def made_s(kek_id: str) -> float | None:
    """When a key was made, in wall-clock seconds; None if its id does not say."""
    match = _ID.fullmatch(kek_id)
    return datetime.strptime(match["made"], _MADE).replace(tzinfo=UTC).timestamp() if match else None


@dataclass(frozen=True, slots=True)
class _Keys:
    current: str
    keys: dict[str, bytes] = field(repr=False)


class FileKeyring:
    """Key-encryption keys in a 0600 file; made with a first key where there is none. The default KeyEncryption.

    Changes by several processes are serialised by a lock file beside it, and each begins with what the file holds then.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open or make the file.

        Raises:
            CorruptError: it is damaged.
            PreconditionError: others may read it.
        """
        self._path = path
        self._clock = clock
        self._changing = threading.Lock()
        make_directory(path.parent)
        if not path.exists():
            with self._alone():
                self._keys = self._read() if path.exists() else self._with_new(_Keys("", {}))
        self._keys = self._read()

    @property
    def ids(self) -> tuple[str, ...]:
        """Every key there is, oldest first."""
        return tuple(sorted(self._keys.keys))

    @property
    def current(self) -> str:
        """Id of the key that wraps from now on."""
        return self._keys.current

    def rotate(self) -> str:
        """Make another key, the current one from now on; on the disk when this returns.

        Raises:
            PreconditionError: the file cannot be written, or has been damaged meanwhile.
        """
        with self._alone():
            self._keys = self._with_new(self._present())
            return self._keys.current

    def erase(self, kek_id: str) -> None:
        """Destroy a key that is not the current one; what is still wrapped under it is lost.

        Raises:
            PreconditionError: it is the current one, or as `rotate`.
            NotFoundError: there is no such key.
        """
        with self._alone():
            keys = self._present()
            if kek_id == keys.current:
                raise PreconditionError(f"key-encryption key {kek_id} is in use; rotate first")
            if kek_id not in keys.keys:
                raise NotFoundError(f"key-encryption key {kek_id!r} is not in {self._path}")
            left = {name: key for name, key in keys.keys.items() if name != kek_id}
            self._keys = self._written(_Keys(keys.current, left))

    def wrap(self, secret: bytes, context: bytes) -> RestingKey:
        """Wrap under the current key."""
        keys = self._keys
        return RestingKey(keys.current, wrap_under(keys.keys[keys.current], secret, context))

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

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Change the file, and nobody else."""
        path = self._path.with_name(f"{self._path.name}.lock")
        try:
            lock = open_new(path, 0o600)
        except OSError as error:
            raise PreconditionError(f"{self._path} cannot be written: {error.strerror or error}") from error
        with self._changing, lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _present(self) -> _Keys:
        """What the file holds now: another process may have changed it. What is in memory, where it is gone."""
        if not self._path.exists():
            return self._keys
        try:
            return self._read()
        except CorruptError as error:
            raise PreconditionError(error.message) from error

    def _with_new(self, before: _Keys) -> _Keys:
        """One more key, the current one from now on; on the disk before it is used."""
        kek_id = new_kek_id(self._clock.wall_s(), before.keys)
        return self._written(_Keys(kek_id, {**before.keys, kek_id: secrets.token_bytes(KEY_BYTES)}))

    def _written(self, keys: _Keys) -> _Keys:
        document = {"current": keys.current, "keys": {name: key.hex() for name, key in keys.keys.items()}}
        try:
            write_durably(self._path, to_checked_json(document), mode=0o600)
        except OSError as error:
            raise PreconditionError(f"{self._path} cannot be written: {error.strerror or error}") from error
        return keys

    def _read(self) -> _Keys:
        mode = self._path.stat().st_mode
        if mode & _OTHERS:
            raise PreconditionError(
                f"{self._path} has mode {mode & 0o777:o}: others may read or change it; allowed: 600, "
                "or 640 for a mounted secret"
            )
        try:
            document = from_checked_json(self._path.read_bytes())
            keys = {str(name): bytes.fromhex(key) for name, key in document["keys"].items()}
            current = str(document["current"])
            if current not in keys or any(len(key) != KEY_BYTES for key in keys.values()):
                raise ValueError("the current key is not among them, or one has another length")
        except (CorruptError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"key-encryption keys: {self._path} is damaged: {error}") from None
        return _Keys(current, keys)
