"""Data keys on the wire: wrapped to one member, and opened by it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import InvalidArgumentError, UnavailableError
from cortex_common.ids import JobId, KeyId
from cortex_common.security.encryption import EncryptionManager
from cortex_common.security.objects import WrappedKey
from cortex_common.security.sealing import KeyWrapper, SealingKey, check_public_key

JOB = JobId("job-1")
KEY = EncryptionManager.new_data_key(3)


def test_a_member_opens_what_was_wrapped_to_it() -> None:
    member, wrapper = SealingKey("net"), KeyWrapper("net")
    wrapped = wrapper.wrap(member.public, JOB, KEY)
    assert member.unwrap(JOB, wrapped) == KEY
    assert KEY.key not in wrapped.wrapped


def test_nobody_else_opens_it() -> None:
    wrapped = KeyWrapper("net").wrap(SealingKey("net").public, JOB, KEY)
    with pytest.raises(UnavailableError, match="wrapped anew"):
        SealingKey("net").unwrap(JOB, wrapped)


@pytest.mark.parametrize(
    ("network", "job", "change"),
    [
        ("other", "job-1", {}),
        ("net", "job-2", {}),
        ("net", "job-1", {"epoch": 4}),
        ("net", "job-1", {"key_id": KeyId("another")}),
        # What separates the parts is not in their place: no two contexts are one text.
        ("net", "job-1\nx", {}),
    ],
)
def test_it_opens_only_in_the_context_it_was_wrapped_for(network: str, job: str, change: dict[str, object]) -> None:
    member = SealingKey(network)
    wrapped = KeyWrapper("net").wrap(member.public, JOB, KEY)
    with pytest.raises(UnavailableError):
        member.unwrap(JobId(job), replace(wrapped, **change))


@given(st.integers(0, 79), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, change: int) -> None:
    member = SealingKey("net")
    wrapped = KeyWrapper("net").wrap(member.public, JOB, KEY)
    spoilt = bytearray(wrapped.wrapped)
    spoilt[place] ^= change
    # X25519 ignores the highest bit of the encapsulated key, but its derivation does not.
    with pytest.raises(UnavailableError):
        member.unwrap(JOB, replace(wrapped, wrapped=bytes(spoilt)))


def test_a_key_is_wrapped_once_for_a_member_and_anew_for_another() -> None:
    wrapper, one, two = KeyWrapper("net"), SealingKey("net"), SealingKey("net")
    assert wrapper.wrap(one.public, JOB, KEY) == wrapper.wrap(one.public, JOB, KEY)
    assert wrapper.wrap(one.public, JOB, KEY) != wrapper.wrap(two.public, JOB, KEY)
    assert wrapper.wrap(one.public, JOB, KEY) != wrapper.wrap(one.public, JobId("job-2"), KEY)
    assert wrapper.wrap(one.public, JOB, KEY) != KeyWrapper("net").wrap(one.public, JOB, KEY)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(33), bytes(32), b"\1" + bytes(31)])
def test_what_everybody_could_open_is_no_public_key(public: bytes) -> None:
    """The last two are points of small order: what is wrapped to them everybody can open."""
    with pytest.raises(InvalidArgumentError, match="sealing"):
        check_public_key(public)


@pytest.mark.parametrize("key", [(KeyId(""), bytes(80)), (KeyId("k"), bytes(32)), (KeyId("k"), b"")])
def test_a_bare_key_is_not_taken_for_a_wrapped_one(key: tuple[KeyId, bytes]) -> None:
    with pytest.raises(InvalidArgumentError, match="wrapped"):
        WrappedKey(key[0], 1, key[1])


def test_it_is_hpke_as_the_standard_has_it() -> None:
    """RFC 9180 by its own text (key schedule and DHKEM over HMAC-SHA256), as another implementation would do it."""
    import hashlib
    import hmac

    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    private = X25519PrivateKey.generate()
    member = SealingKey("net", private)
    wrapped = KeyWrapper("net").wrap(member.public, JOB, KEY)
    info = b"\n".join((b"cortex data key v1", b"net", b"job-1", KEY.key_id.encode(), b"3"))

    def extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + secret, hashlib.sha256)

    def expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
        return hmac.digest(key, labelled + b"\1", hashlib.sha256)[:length]

    kem = b"KEM" + (0x0020).to_bytes(2, "big")
    suite = b"HPKE" + bytes.fromhex("002000010002")
    encapsulated, sealed = wrapped.wrapped[:32], wrapped.wrapped[32:]
    shared = private.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    eae = extract(kem, b"", b"eae_prk", shared)
    secret = expand(kem, eae, b"shared_secret", encapsulated + member.public, 32)
    context = b"\0" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    schedule = extract(suite, secret, b"secret", b"")
    key = expand(suite, schedule, b"key", context, 32)
    nonce = expand(suite, schedule, b"base_nonce", context, 12)
    assert AESGCM(key).decrypt(nonce, sealed, b"") == KEY.key
