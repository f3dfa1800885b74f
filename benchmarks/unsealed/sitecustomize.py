"""On the path of a benchmark's processes alone: what is sealed is copied instead, and so protects nothing.

Python imports a module of this name when it starts. Keys are wrapped as ever; only bulk data goes in the clear (inside
mutual TLS), so the difference to a sealed round is what AES-256-GCM costs.
"""

from __future__ import annotations

from cortex_common.security import encryption

_TAG = bytes(encryption.TAG_BYTES)
_Real = encryption.AESGCM


class CopyingCipher:
    """The bulk side of AESGCM, without the encryption."""

    def __init__(self, key: bytes) -> None:
        self._real = _Real(key)

    def encrypt(self, nonce: bytes, data: bytes, context: bytes | None) -> bytes:
        """A copy and an empty tag; keys, which have a context, are sealed."""
        return bytes(data) + _TAG if context is None else self._real.encrypt(nonce, data, context)

    def decrypt(self, nonce: bytes, data: bytes, context: bytes | None) -> bytes:
        """A copy without the tag."""
        return bytes(data[: -len(_TAG)]) if context is None else self._real.decrypt(nonce, data, context)

    def encrypt_into(self, nonce: bytes, data: bytes, context: None, out: bytearray) -> int:
        """The same into a buffer."""
        size = len(data)
        room = memoryview(out)
        room[:size] = data
        room[size : size + len(_TAG)] = _TAG
        return size + len(_TAG)

    def decrypt_into(self, nonce: bytes, data: bytes, context: None, out: bytearray) -> int:
        """The same into a buffer."""
        size = len(data) - len(_TAG)
        memoryview(out)[:size] = memoryview(data)[:size]
        return size


encryption.AESGCM = CopyingCipher
