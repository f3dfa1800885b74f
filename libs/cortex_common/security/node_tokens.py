"""Node tokens: what a node without a certificate proves itself with, at a gateway. The token itself never travels.

From the token's secret both sides derive one Ed25519 key: the node signs with it, the network keeps only its public
half. So neither a gateway on the way nor who reads what discovery keeps can speak for the node.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cortex_common.errors import InvalidArgumentError, UnauthenticatedError

_PREFIX = "ctxnode"
_FORM = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_([0-9a-f]{{64}})")
_PURPOSE = b"cortex.v1 node token"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class NodeToken:
    """A node token.

    Attributes:
        token_id: Names it in lists and messages; no secret.
        secret: 32 bytes.
    """

    token_id: str
    secret: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> NodeToken:
        """A new one."""
        return cls(secrets.token_hex(6), secrets.token_bytes(_SECRET_BYTES))

    def encode(self) -> str:
        """The token as a person carries it: `ctxnode_<id>_<secret>`, both in hexadecimal."""
        return f"{_PREFIX}_{self.token_id}_{self.secret.hex()}"

    @classmethod
    def decode(cls, text: str) -> NodeToken:
        """Read a token.

        Raises:
            InvalidArgumentError: it is none; the text is not repeated in the message.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise InvalidArgumentError(
                "this is no node token; allowed is what `cortex node token --gateway` printed, "
                f"{_PREFIX}_<id>_<secret>, whole"
            )
        return cls(match[1], bytes.fromhex(match[2]))

    @property
    def public_key(self) -> str:
        """What the network keeps of it: the public half of the derived key, in hexadecimal."""
        return self._key().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def prove(self, network: str, node: str, sealing_key: str, challenge: str) -> str:
        """The answer to a challenge: a signature, in hexadecimal, that binds node and sealing key to it."""
        return self._key().sign(_statement(network, node, sealing_key, challenge)).hex()

    def _key(self) -> Ed25519PrivateKey:
        derived = HKDF(SHA256(), _SECRET_BYTES, salt=None, info=_PURPOSE).derive(self.secret)
        return Ed25519PrivateKey.from_private_bytes(derived)


def check_proof(public_key: str, proof: str, network: str, node: str, sealing_key: str, challenge: str) -> None:
    """Return if the proof was made with the token that this public key is of.

    Raises:
        UnauthenticatedError: it was not.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(proof), _statement(network, node, sealing_key, challenge))
    except (InvalidSignature, ValueError):
        raise UnauthenticatedError(
            "the proof is wrong: made with another token, or for another node, sealing key or challenge", "token"
        ) from None


def _statement(network: str, node: str, sealing_key: str, challenge: str) -> bytes:
    """What is signed. None of the parts can hold a line break."""
    return "\n".join(("cortex.v1 join", network, node, sealing_key, challenge)).encode()
