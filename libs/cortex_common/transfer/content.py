"""The digest of an upload: SHA-256 over the SHA-256 of every sealed chunk, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def chunk_digest(sealed: bytes | memoryview) -> bytes:
    """SHA-256 of one sealed chunk."""
    return hashlib.sha256(sealed).digest()


def content_digest(chunk_digests: Iterable[bytes]) -> bytes:
    """Digest of a whole object from those of its chunks."""
    total = hashlib.sha256()
    for digest in chunk_digests:
        total.update(digest)
    return total.digest()
