"""How data keys travel: wrapped by the coordinator to the sealing key of each member, and opened by it alone.

A member is whoever takes part in a job: a worker, or an aggregator. Its sealing key is made at each start of its
process, stays in its memory, and is bound to its identity by the mutual TLS over which the coordinator hears its public
half. So a stolen disk opens no recorded traffic, and a new start needs no more than to say the new key.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cortex_common.errors import CorruptError, InvalidArgumentError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.security.encryption import unwrap_with, wrap_for
from cortex_common.security.objects import DataKey, WrappedKey
from cortex_common.storage.durable import make_directory, write_durably

PUBLIC_BYTES = 32
_REMEMBERED = 4096

Wrap = Callable[[JobId, DataKey], WrappedKey]
"""Wraps a data key to one member; the job is that of the message the key travels in."""


class SealingKey:
    """A member's own X25519 key. What it has opened it remembers."""

    def __init__(self, network: str, private: X25519PrivateKey | None = None) -> None:
        self._network = network
        self._private = private or X25519PrivateKey.generate()
        self._opened = lru_cache(_REMEMBERED)(self._open)

    @classmethod
    def of(cls, network: str, private: bytes) -> SealingKey:
        """The one with these 32 bytes as its private half."""
        return cls(network, X25519PrivateKey.from_private_bytes(private))

    @classmethod
    def kept(cls, network: str, path: Path) -> tuple[SealingKey, bool]:
        """The one in a file, and whether it was made just now: base64, readable by its owner only.

        Raises:
            InvalidArgumentError: the file holds something else.
        """
        is_new = not path.exists()
        if is_new:
            make_directory(path.parent)
            write_durably(path, b64encode(X25519PrivateKey.generate().private_bytes_raw()) + b"\n", mode=0o600)
        try:
            return cls.of(network, b64decode(path.read_bytes(), validate=False)), is_new
        except ValueError:
            raise InvalidArgumentError(f"{path} holds no sealing key; allowed: 32 bytes as base64") from None

    @property
    def public(self) -> bytes:
        """What others wrap keys to."""
        return self._private.public_key().public_bytes_raw()

    def unwrap(self, job_id: JobId, key: WrappedKey) -> DataKey:
        """The data key of a job.

        Raises:
            UnavailableError: it does not open; wrapped anew it will, unless the networks' names differ.
        """
        return self._opened(job_id, key)

    def unwrap_once(self, job_id: JobId, key: WrappedKey) -> DataKey:
        """The same, but not remembered: for what is opened once and then forgotten. UnavailableError: as `unwrap`."""
        return self._open(job_id, key)

    def _open(self, job_id: JobId, key: WrappedKey) -> DataKey:
        try:
            opened = unwrap_with(self._private, key.wrapped, wrapping_context(self._network, job_id, key))
        except CorruptError as error:
            raise UnavailableError(
                f"data key {key.key_id} of job {job_id} does not open with the sealing key of this process in network "
                f"{self._network!r}; it has to be wrapped anew"
            ) from error
        return DataKey(key.key_id, key.epoch, opened)


class KeyWrapper:
    """The coordinator's side: wraps data keys to members. The same key to the same member is wrapped once."""

    def __init__(self, network: str) -> None:
        self._network = network
        self._wrapped = lru_cache(_REMEMBERED)(self._wrap)

    def wrap(self, member: bytes, job_id: JobId, key: DataKey) -> WrappedKey:
        """A data key for the holder of the sealing key whose public half is `member`.

        Raises:
            InvalidArgumentError: not a public key.
        """
        return self._wrapped(member, job_id, key)

    def _wrap(self, member: bytes, job_id: JobId, key: DataKey) -> WrappedKey:
        context = wrapping_context(self._network, job_id, key)
        return WrappedKey(key.key_id, key.epoch, wrap_for(member, key.key, context))


def check_public_key(public_key: bytes) -> None:
    """Refuse what nothing can be wrapped to.

    Raises:
        InvalidArgumentError: not an X25519 public key.
    """
    if len(public_key) != PUBLIC_BYTES:
        raise InvalidArgumentError(
            f"sealing_key: {len(public_key)} bytes given; allowed: an X25519 public key of {PUBLIC_BYTES}"
        )
    wrap_for(public_key, b"", b"")


def wrapping_context(network: str, job_id: JobId, key: DataKey | WrappedKey) -> bytes:
    """What a wrapped key is bound to, HPKE's `info`: docs/keys.md tells it to other implementations."""
    return "\n".join(("cortex data key v1", network, job_id, key.key_id, str(key.epoch))).encode()
