"""DSSE envelopes: a payload, what it is, and signatures over both. Data only; keys are in `security.signing`.

Source: https://github.com/secure-systems-lab/dsse, protocol and envelope version 1.0.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cortex_common.errors import InvalidArgumentError

MAX_BYTES = 1 << 20
_KEYS = frozenset({"payloadType", "payload", "signatures"})
_MAX_SIGNATURES = 32


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature; `key_id` tells which key may have made it, and is not to be trusted."""

    key_id: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload with its type and signatures."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...] = ()

    @property
    def signed_bytes(self) -> bytes:
        """What signatures are made over, DSSE's pre-authentication encoding: type and payload, with their lengths."""
        kind = self.payload_type.encode()
        return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(self.payload), self.payload)

    def to_json(self) -> str:
        """DSSE's JSON form, in one line."""
        signatures = [
            {"keyid": each.key_id, "sig": base64.b64encode(each.signature).decode()} for each in self.signatures
        ]
        document = {
            "payloadType": self.payload_type,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": signatures,
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, subject: str = "envelope") -> Envelope:
        """Read DSSE's JSON form.

        Raises:
            InvalidArgumentError: it is no envelope; says why.
        """
        if len(text) > MAX_BYTES:
            raise InvalidArgumentError(f"{subject}: {len(text)} bytes; allowed are {MAX_BYTES}")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{subject} is not JSON: {error}") from None
        if not is_envelope(document):
            raise InvalidArgumentError(f"{subject}: allowed is a DSSE envelope with {', '.join(sorted(_KEYS))}")
        return cls.from_document(document, subject)

    @classmethod
    def from_document(cls, document: Mapping[str, object], subject: str = "envelope") -> Envelope:
        """The same from a document that has been read from JSON.

        Raises:
            InvalidArgumentError: it is no envelope; says why.
        """
        kind, signatures = document.get("payloadType"), document.get("signatures")
        if not isinstance(kind, str) or not isinstance(signatures, list) or set(document) != _KEYS:
            raise InvalidArgumentError(f"{subject}: allowed is a DSSE envelope with {', '.join(sorted(_KEYS))}")
        if len(signatures) > _MAX_SIGNATURES:
            raise InvalidArgumentError(f"{subject}: {len(signatures)} signatures; allowed are {_MAX_SIGNATURES}")
        payload = _decoded(document.get("payload"), f"{subject}: payload")
        return cls(kind, payload, tuple(_signature(each, subject) for each in signatures))


def is_envelope(document: object) -> bool:
    """Whether a document read from JSON or YAML means to be an envelope."""
    return isinstance(document, Mapping) and "payloadType" in document


def _signature(document: object, subject: str) -> Signature:
    if not isinstance(document, Mapping) or not isinstance(document.get("keyid", ""), str):
        raise InvalidArgumentError(f"{subject}: signatures: allowed are mappings with keyid and sig")
    return Signature(str(document.get("keyid", "")), _decoded(document.get("sig"), f"{subject}: signatures: sig"))


def _decoded(value: object, subject: str) -> bytes:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{subject} is missing; allowed: base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgumentError(f"{subject} is not base64") from None
