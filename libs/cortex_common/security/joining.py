"""Join tokens: what lets one node into the network, once; carried to it by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass

from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Identity

_PREFIX = "ctxjoin_"
_SECRET_BYTES = 32
_MAX_CHARACTERS = 2048


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A join token.

    Attributes:
        token_id: Names it in lists; no secret.
        identity: Who may join with it.
        region: Where.
        address: host:port at which nodes enrol.
        fingerprint: SHA-256 of the root that the server there must prove to be of.
        secret: 32 bytes; discovery keeps their hash only.
    """

    token_id: str
    identity: Identity
    region: str
    address: str
    fingerprint: str
    secret: bytes

    @classmethod
    def fresh(cls, identity: Identity, region: str, address: str, fingerprint: str) -> JoinToken:
        """A new one."""
        return cls(secrets.token_hex(6), identity, region, address, fingerprint, secrets.token_bytes(_SECRET_BYTES))

    @property
    def hash(self) -> str:
        """What is kept of the secret."""
        return hash_of(self.secret)

    def encode(self) -> str:
        """The token as a person carries it."""
        values = {
            "i": self.token_id,
            "u": self.identity.uri,
            "g": self.region,
            "a": self.address,
            "f": self.fingerprint,
            "s": base64.b64encode(self.secret).decode(),
        }
        return _PREFIX + base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Read a token.

        Raises:
            InvalidArgumentError: it is none; the text is not repeated in the message.
        """
        text = text.strip()
        try:
            if not text.startswith(_PREFIX) or len(text) > _MAX_CHARACTERS:
                raise ValueError
            values = json.loads(base64.b64decode(text.removeprefix(_PREFIX), altchars=b"-_", validate=True))
            token = cls(
                str(values["i"]),
                Identity.parse(str(values["u"])),
                str(values["g"]),
                str(values["a"]),
                str(values["f"]),
                base64.b64decode(values["s"], validate=True),
            )
        except (ValueError, KeyError, TypeError, RecursionError, InvalidArgumentError):
            raise InvalidArgumentError(
                f"this is no join token; allowed is what `cortex node token` printed, {_PREFIX}…, whole"
            ) from None
        if len(token.secret) != _SECRET_BYTES or len(token.fingerprint) != 64:
            raise InvalidArgumentError(
                "this join token is cut short; allowed is what `cortex node token` printed, whole"
            )
        return token


def hash_of(secret: bytes) -> str:
    """What is kept of a token's secret; it is random and long, so that a plain hash will do."""
    return hashlib.sha256(secret).hexdigest()
