"""Ed25519 keys of people who sign jobs and data sets: making, keeping and using them, and checking signatures."""

from __future__ import annotations

import base64
import binascii
import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cortex_common.envelope import Envelope, Signature
from cortex_common.errors import AlreadyExistsError, CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.security.certificates import read_file
from cortex_common.security.issuing import write_files

_PREFIX = "ed25519:"
_PUBLIC_BYTES = 32
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half; written `ed25519:<base64>`."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read the written form.

        Raises:
            InvalidArgumentError: not one.
        """
        try:
            raw = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if not text.startswith(_PREFIX) or len(raw) != _PUBLIC_BYTES:
            raise InvalidArgumentError(f"{text[:80]!r} given; allowed: {_PREFIX} and 32 bytes in base64")
        return cls(raw)

    def __str__(self) -> str:
        return _PREFIX + base64.b64encode(self.raw).decode()

    @property
    def key_id(self) -> str:
        """What signatures call the key: SHA-256 of it, in part."""
        return hashlib.sha256(self.raw).hexdigest()[:32]

    def has_signed(self, envelope: Envelope) -> bool:
        """Whether a signature of the envelope is by this key. What the signature says of its key is not asked."""
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        return any(_verifies(key, each.signature, envelope.signed_bytes) for each in envelope.signatures)


class SigningKey:
    """A person's private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @property
    def public(self) -> PublicKey:
        """What sites are given to recognise its signatures by."""
        return PublicKey(self._private.public_key().public_bytes_raw())

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key, in a file that only its owner can read.

        Raises:
            AlreadyExistsError: there is a file.
        """
        if path.exists():
            raise AlreadyExistsError(f"{path} exists; a key is never overwritten")
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files([(path, pem, 0o600)])
        return cls(made)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in a file.

        Raises:
            NotFoundError: it cannot be read.
            PreconditionError: others may read it too.
            CorruptError: it holds no Ed25519 key.
        """
        pem = read_file(path, "signing key")
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _OTHERS:
            raise PreconditionError(f"signing key {path} has mode {mode:o}: others may read it; allowed: 600")
        try:
            private = load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise CorruptError(f"{path} holds no Ed25519 private key in PEM; `cortex sign --new-key` makes one")
        return cls(private)

    def sign(self, envelope: Envelope) -> Envelope:
        """The envelope with a signature by this key besides those of others."""
        public = self.public
        others = tuple(each for each in envelope.signatures if each.key_id != public.key_id)
        own = Signature(public.key_id, self._private.sign(envelope.signed_bytes))
        return replace(envelope, signatures=(*others, own))


def signers(envelope: Envelope, keys: Iterable[PublicKey]) -> frozenset[PublicKey]:
    """Those of the keys that have signed an envelope."""
    return frozenset(key for key in keys if key.has_signed(envelope))


def _verifies(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True
