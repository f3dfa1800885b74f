"""Heads of audit logs, signed with the key of the node's certificate."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from cortex_common.errors import CorruptError, UnauthenticatedError
from cortex_common.identity import TlsFiles
from cortex_common.security.audit import Head
from cortex_common.security.certificates import Certificate, key_of_chain, read_certificate, read_file
from cortex_common.security.issuing import UNREADABLE, load_key, write_files

HEADS_FILE = "heads.jsonl"
KEPT_HEADS = 1000
SIGN_EVERY_S = 60.0
"""How often a service signs the head of a log that grows."""
# A renewal replaces key and certificate by renames, one right after the other.
_READS = 5
_ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A statement whose signature is right: that a log ended there.

    Attributes:
        by: The certificate it is signed with.
        head: Where the log ended.
        at_s: When, as the signer says; wall time.
        chain: Its certificate and the authorities above it, PEM.
    """

    by: Certificate
    head: Head
    at_s: float
    chain: bytes

    @property
    def is_late(self) -> bool:
        """Whether the certificate had ended by then, as it could when earlier versions signed."""
        return self.at_s > self.by.not_after.timestamp()

    def require_root(self, roots: bytes) -> None:
        """Refuse a certificate that did not lead up to one of the roots (PEM) when it was used, or ended.

        Raises:
            UnauthenticatedError: it did not.
            CorruptError: its authorities cannot be read.
        """
        try:
            key_of_chain(self.chain, roots, min(self.at_s, self.by.not_after.timestamp()))
        except (OverflowError, OSError, *UNREADABLE) as error:
            raise CorruptError(f"not a signed head: {error}") from None


def sign_head(head: Head, tls: TlsFiles, at_s: float) -> Mapping[str, Any]:
    """A statement that the log ended there, then: what is exported, and kept where the log's owner cannot change it.

    Raises:
        CorruptError: the node's key is not one of Cortex's, or not that of its certificate.
        UnauthenticatedError: its certificate does not hold then, so that nobody would believe it.
    """
    chain, key = _chain_and_key(tls)
    certificate = read_certificate(chain)
    if not certificate.not_before.timestamp() <= at_s <= certificate.not_after.timestamp():
        raise UnauthenticatedError(f"the certificate holds from {certificate.not_before} to {certificate.not_after}")
    said = {
        "by": certificate.identity.uri,
        "number": head.number,
        "hash": head.hash,
        "at_s": round(at_s, 3),
    }
    signature = key.sign(_bytes(said), _ALGORITHM)
    return {**said, "certificate": chain.decode(), "signature": base64.b64encode(signature).decode()}


def _chain_and_key(tls: TlsFiles) -> tuple[bytes, ec.EllipticCurvePrivateKey]:
    """A node's certificate with the authorities above it, and the key that belongs to it."""
    for _ in range(_READS):
        chain = read_file(tls.certificate, "certificate")
        key = load_key(read_file(tls.key, "private key"), str(tls.key))
        try:
            if x509.load_pem_x509_certificate(chain).public_key() == key.public_key():
                return chain, key
        except UNREADABLE as error:
            raise CorruptError(f"{tls.certificate} is no certificate: {error}") from None
    raise CorruptError(f"{tls.key} is not the key of {tls.certificate}")


def verified_head(statement: Mapping[str, Any]) -> SignedHead:
    """A head whose signature is right. Whether the certificate is the network's, `require_root` tells.

    Raises:
        CorruptError: not a signed head, or its signature is wrong.
    """
    try:
        chain = str(statement["certificate"]).encode()
        said = {name: statement[name] for name in ("by", "number", "hash", "at_s")}
        by = read_certificate(chain)
        key = x509.load_pem_x509_certificate(chain).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or by.identity.uri != said["by"]:
            raise CorruptError("a head is signed with another certificate than that of the service it names")
        key.verify(base64.b64decode(str(statement["signature"]), validate=True), _bytes(said), _ALGORITHM)
        return SignedHead(by, Head(int(said["number"]), str(said["hash"])), float(said["at_s"]), chain)
    except InvalidSignature:
        raise CorruptError("the signature of the head is wrong") from None
    except (KeyError, OverflowError, UnauthenticatedError, *UNREADABLE) as error:
        raise CorruptError(f"not a signed head: {error}") from None


def add_head(path: Path, statement: Mapping[str, Any]) -> None:
    """Add a head to the newest ones in a file."""
    kept = path.read_text(encoding="utf-8").splitlines()[1 - KEPT_HEADS :] if path.exists() else []
    lines = [*kept, json.dumps(statement, separators=(",", ":"))]
    write_files([(path, ("\n".join(lines) + "\n").encode(), 0o600)])


def read_heads(path: Path) -> list[Mapping[str, Any]]:
    """The heads in a file, oldest first; none if there is none.

    Raises:
        CorruptError: a line is none.
    """
    if not path.exists():
        return []
    try:
        heads = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(head, dict) for head in heads):
            raise TypeError("a head is a JSON object")
        return heads
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptError(f"{path}: a line is no signed head: {error}") from None


def heads_elsewhere(path: Path) -> list[Mapping[str, Any]]:
    """The heads in a file that was kept elsewhere: lines of `heads.jsonl`, or the log lines `audit_head` of services.

    Other lines are passed over.

    Raises:
        NotFoundError: it cannot be read.
        CorruptError: there is no head in it.
    """
    found = []
    for line in read_file(path, "file of heads").splitlines():
        try:
            said = json.loads(line)
            if isinstance(said["number"], int) and isinstance(said["hash"], str) and isinstance(said["by"], str):
                found.append(said)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if not found:
        raise CorruptError(f"{path} holds no head; allowed: lines of {HEADS_FILE}, log lines audit_head that name `by`")
    return found


def _bytes(said: Mapping[str, Any]) -> bytes:
    return b"cortex.v1 audit head\n" + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
