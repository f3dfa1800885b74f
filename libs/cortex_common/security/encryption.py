"""EncryptionManager: sealing of models and updates, and wrapping of keys. The only place that constructs ciphers.

Each object (one upload, one stored version) has its own key, derived from the job's data key, a fresh salt and the
object's header; so a header of another job, round, sender or codec opens nothing. Chunk i is one AES-256-GCM message
under the nonce prefix || i || last, so a reordered, dropped, truncated or spliced chunk opens nothing either. (The
construction of Tink's AES-GCM-HKDF streaming.) Sealing the same plaintext under the same header gives the same bytes;
new plaintext takes a new salt.

Keys are never sealed as objects: one that travels is wrapped to its receiver with HPKE (RFC 9180, base mode), one that
rests is wrapped with AES-256-GCM under a random nonce, and both only under the context that they were wrapped for.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.ids import KeyId
from cortex_common.security.objects import KEY_BYTES, DataKey, ObjectHeader, ObjectKind

__all__ = ["TAG_BYTES", "DataKey", "EncryptionManager", "ObjectHeader", "ObjectKind", "Opener", "Sealer"]

TAG_BYTES = 16
_PREFIX_BYTES = 7
_NONCE_BYTES = 12
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_MAX_CHUNKS = 1 << 32


class Sealer:
    """Seals the chunks of one object."""

    def __init__(self, cipher: AESGCM, prefix: bytes, chunks: int) -> None:
        self._cipher = cipher
        self._prefix = prefix
        self._chunks = chunks

    def seal(self, index: int, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Ciphertext and tag of chunk `index`."""
        return self._cipher.encrypt(_nonce(self._prefix, index, self._chunks), plaintext, None)

    def seal_into(self, index: int, plaintext: bytes | bytearray | memoryview, out: bytearray | memoryview) -> int:
        """The same into a buffer of exactly the plaintext's length and `TAG_BYTES`; returns the bytes written."""
        return self._cipher.encrypt_into(_nonce(self._prefix, index, self._chunks), plaintext, None, out)


class Opener:
    """Opens the chunks of one object."""

    def __init__(self, cipher: AESGCM, prefix: bytes, chunks: int, what: str) -> None:
        self._cipher = cipher
        self._prefix = prefix
        self._chunks = chunks
        self._what = what

    def open(self, index: int, sealed: bytes | bytearray | memoryview) -> bytes:
        """The plaintext of chunk `index`.

        Raises:
            CorruptError: it was changed, reordered, cut, or belongs to another object.
        """
        try:
            return self._cipher.decrypt(_nonce(self._prefix, index, self._chunks), sealed, None)
        except InvalidTag as exc:
            raise CorruptError(
                f"chunk {index} of {self._what} does not open: changed, out of place or of another object"
            ) from exc

    def open_into(self, index: int, sealed: bytes | bytearray | memoryview, scratch: bytearray) -> memoryview:
        """The plaintext of chunk `index` in a buffer used again and again; valid until the next call with it.

        Raises:
            CorruptError: as `open`, or longer than `scratch`.
        """
        size = len(sealed) - TAG_BYTES
        if not 0 <= size <= len(scratch):
            raise CorruptError(f"chunk {index} of {self._what} has an impossible length of {len(sealed)} bytes")
        out = memoryview(scratch)[:size]
        try:
            self._cipher.decrypt_into(_nonce(self._prefix, index, self._chunks), sealed, None, out)
        except InvalidTag as exc:
            raise CorruptError(
                f"chunk {index} of {self._what} does not open: changed, out of place or of another object"
            ) from exc
        return out


class EncryptionManager:
    """Holds data keys by id and makes the sealers and openers of objects.

    >>> from cortex import EncryptionManager
    >>> from cortex_common.security.objects import ObjectHeader, ObjectKind
    >>> key = EncryptionManager.new_data_key()
    >>> header = ObjectHeader(
    ...     kind=ObjectKind.UPDATE, network="cortex", job_id="job-1", round=1, attempt=0, fence=1, sender="gpu-7",
    ...     seat=0, key_id=key.key_id, codec="none", codec_options="", chunk_elements=256, elements=512, counters=0,
    ...     chunks=2, manifest_sha256="0" * 64,
    ... ).fresh()
    >>> sender, receiver = EncryptionManager(key), EncryptionManager(key)
    >>> sealed = sender.sealer(header).seal(0, b"weights")
    >>> receiver.opener(header).open(0, sealed)
    b'weights'
    >>> receiver.opener(header).open(1, sealed)  # out of place
    Traceback (most recent call last):
    cortex_common.errors.CorruptError: chunk 1 of the update of job job-1 round 1 by gpu-7 does not open: ...
    """

    def __init__(self, *keys: DataKey) -> None:
        self._keys: dict[KeyId, DataKey] = {}
        for key in keys:
            self.add(key)

    @staticmethod
    def new_data_key(epoch: int = 1) -> DataKey:
        """A fresh random key with a fresh id."""
        return DataKey(KeyId(os.urandom(16).hex()), epoch, os.urandom(KEY_BYTES))

    def add(self, key: DataKey) -> None:
        """Keep a key for the objects that name it.

        Raises:
            InvalidArgumentError: another key is known under the same id.
        """
        known = self._keys.setdefault(key.key_id, key)
        if known.key != key.key:
            raise InvalidArgumentError(f"data key {key.key_id}: another key has this id already")

    def forget(self, key_id: KeyId) -> None:
        """Drop a key."""
        self._keys.pop(key_id, None)

    def has(self, key_id: KeyId) -> bool:
        """Whether objects under this key can be opened here."""
        return key_id in self._keys

    def sealer(self, header: ObjectHeader) -> Sealer:
        """Seal the object that this header describes; the header must be `fresh`.

        Raises:
            NotFoundError: the key it names is not here.
        """
        cipher, prefix = self._derive(header)
        return Sealer(cipher, prefix, header.chunks)

    def opener(self, header: ObjectHeader) -> Opener:
        """Open the object that this header describes.

        Raises:
            NotFoundError: the key it names is not here.
        """
        cipher, prefix = self._derive(header)
        if header.kind is ObjectKind.SHARD:
            what = f"shard {header.round} of data set {header.job_id}"
        else:
            what = f"the {header.kind.value} of job {header.job_id} round {header.round} by {header.sender}"
        return Opener(cipher, prefix, header.chunks, what)

    def _derive(self, header: ObjectHeader) -> tuple[AESGCM, bytes]:
        key = self._keys.get(header.key_id)
        if key is None:
            raise NotFoundError(f"data key {header.key_id} of job {header.job_id} is not here")
        if len(header.salt) != 32 or len(header.object_id) != 16 or not 0 < header.chunks <= _MAX_CHUNKS:
            raise InvalidArgumentError("object header: needs a 16-byte id, a 32-byte salt and at least one chunk")
        info = hashlib.sha256(header.canonical()).digest()
        derived = HKDF(SHA256(), KEY_BYTES + _PREFIX_BYTES, header.salt, info).derive(key.key)
        return AESGCM(derived[:KEY_BYTES]), derived[KEY_BYTES:]


def wrap_for(public_key: bytes, secret: bytes, context: bytes) -> bytes:
    """The secret, for the holder of an X25519 key alone: encapsulated key, ciphertext, tag.

    Raises:
        InvalidArgumentError: no X25519 public key, or one that everybody has the private key of.
    """
    try:
        return _HPKE.encrypt(secret, X25519PublicKey.from_public_bytes(public_key), context)
    except ValueError:
        raise InvalidArgumentError("sealing key: no X25519 public key of 32 bytes") from None


def unwrap_with(private_key: X25519PrivateKey, wrapped: bytes, context: bytes) -> bytes:
    """The secret that `wrap_for` wrapped.

    Raises:
        CorruptError: it was changed, wrapped for another key, or under another context.
    """
    try:
        return _HPKE.decrypt(wrapped, private_key, context)
    except (InvalidTag, ValueError) as exc:
        raise CorruptError("a wrapped key does not open: changed, for another receiver or of another context") from exc


def wrap_under(key: bytes, secret: bytes, context: bytes) -> bytes:
    """The secret as it rests under a key: nonce, ciphertext, tag. A key may wrap 2**32 of them."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, secret, context)


def unwrap_under(key: bytes, wrapped: bytes, context: bytes) -> bytes:
    """The secret that `wrap_under` wrapped.

    Raises:
        CorruptError: it was changed, wrapped under another key, or under another context.
    """
    try:
        return AESGCM(key).decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as exc:
        raise CorruptError("a wrapped key does not open: changed, under another key or of another context") from exc


def derive_key(key: DataKey, part: int) -> DataKey:
    """The key of one part of what a key is for: whoever has it can open that part, and derive nothing else."""
    name = f"{key.key_id}-{part}"
    derived = HKDF(SHA256(), KEY_BYTES, None, b"cortex part key v1\n" + name.encode()).derive(key.key)
    return DataKey(KeyId(name), key.epoch, derived)


def _nonce(prefix: bytes, index: int, chunks: int) -> bytes:
    if not 0 <= index < chunks:
        raise CorruptError(f"chunk {index} of an object with {chunks} chunks")
    return prefix + index.to_bytes(4, "big") + (b"\1" if index == chunks - 1 else b"\0")
