"""Heads of audit logs, signed with the key of the node's certificate."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cortex_common.errors import CorruptError, UnauthenticatedError
from cortex_common.identity import Identity, TlsFiles
from cortex_common.security.audit import Head
from cortex_common.security.certificates import read_certificate, read_file
from cortex_common.security.issuing import UNREADABLE, write_files

HEADS_FILE = "heads.jsonl"
KEPT_HEADS = 1000
_ALGORITHM = ec.ECDSA(hashes.SHA256())


def sign_head(head: Head, tls: TlsFiles, at_s: float) -> Mapping[str, Any]:
    """A statement that the log ended there, then: what is exported, and kept where the log's owner cannot change it.

    Raises:
        CorruptError: the node's key is not one of Cortex's.
    """
    chain = read_file(tls.certificate, "certificate")
    key = load_pem_private_key(read_file(tls.key, "private key"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CorruptError(f"{tls.key} is not an elliptic-curve key")
    said = {
        "by": read_certificate(chain).identity.uri,
        "number": head.number,
        "hash": head.hash,
        "at_s": round(at_s, 3),
    }
    signature = key.sign(_bytes(said), _ALGORITHM)
    return {**said, "certificate": chain.decode(), "signature": base64.b64encode(signature).decode()}


def verified_head(statement: Mapping[str, Any]) -> tuple[Identity, Head]:
    """Who signed a head, and what it says. Whether the certificate is the network's is the caller's to check.

    Raises:
        CorruptError: not a signed head, or its signature is wrong.
    """
    try:
        chain = str(statement["certificate"]).encode()
        said = {name: statement[name] for name in ("by", "number", "hash", "at_s")}
        identity = read_certificate(chain).identity
        key = x509.load_pem_x509_certificate(chain).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or identity.uri != said["by"]:
            raise CorruptError(f"the head by {said['by']!r} is signed with another certificate")
        key.verify(base64.b64decode(str(statement["signature"]), validate=True), _bytes(said), _ALGORITHM)
        return identity, Head(int(said["number"]), str(said["hash"]))
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
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise CorruptError(f"{path}: a line is no signed head: {error}") from None


def _bytes(said: Mapping[str, Any]) -> bytes:
    return b"cortex.v1 audit head\n" + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
