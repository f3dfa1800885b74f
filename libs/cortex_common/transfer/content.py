"""The digest of an upload: SHA-256 over the authentication tags of its sealed chunks, in order.

A chunk's AES-256-GCM tag already is a digest of it under the object's own key, and AES-NI makes it for nothing, where
SHA-256 over every byte cost a seventh of a round's CPU. Why the tag is enough here:

- What the digest is for: it tells one upload from another (is this what was accepted, is this what is listed), and it
  says that no chunk is missing. It is no proof towards third parties.
- Against accidents, and anybody without the key, a tag identifies its chunk but for odds of 2^-128 times its blocks,
  and it covers the chunk's place and the object's header through nonce and key.
- Whoever holds the key can make two ciphertexts with one tag. For an upload that is its sender, who is known by its
  certificate and can fill only its own seat, once: it would swap its own update for its own update, before acceptance.
- Chunks are never believed because of this digest: whoever uses one opens it, which checks the tag against every byte.
  So does an upload that is resumed after a restart, with what a killed process left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cortex_common.security.encryption import TAG_BYTES


def chunk_digest(sealed: bytes | memoryview) -> bytes:
    """The authentication tag of one sealed chunk."""
    return bytes(sealed[-TAG_BYTES:])


def content_digest(chunk_digests: Iterable[bytes]) -> bytes:
    """Digest of a whole object from those of its chunks."""
    return hashlib.sha256(b"".join(chunk_digests)).digest()
