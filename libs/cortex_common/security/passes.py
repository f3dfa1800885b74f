"""Passes: discovery's signed word that a gateway may speak for a node, for a few minutes.

A gateway gets one only for a proof that the node made just then, and presents it with each call it makes for the node.
Every service checks it by itself: discovery's certificate is in it, and leads up to a root of the network.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cortex_common.errors import CorruptError, InvalidArgumentError, UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.security.certificates import Certificate, key_of_chain, read_certificate, read_file
from cortex_common.security.issuing import CLOCK_SKEW, UNREADABLE

_ALGORITHM = ec.ECDSA(hashes.SHA256())
_MAX_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class NodePass:
    """That a gateway may speak for a node.

    Attributes:
        node: For whom; always a worker.
        region: Where it is.
        gateway: Who may speak.
        sealing_key: The node's X25519 public key, in hexadecimal, as it signed it itself.
        token_id: Of the token the node proved to have.
        issued_s, expires_s: Wall time.
    """

    node: Identity
    region: str
    gateway: Identity
    sealing_key: str
    token_id: str
    issued_s: float
    expires_s: float

    @property
    def standing(self) -> Certificate:
        """The node's standing, in the form of a certificate: shut out, and let in again, by the same lists."""
        begins = dt.datetime.fromtimestamp(self.issued_s, dt.UTC) - CLOCK_SKEW
        ends = dt.datetime.fromtimestamp(self.expires_s, dt.UTC)
        return Certificate(self.node, begins, ends, serial_of(self.token_id))


def serial_of(token_id: str) -> int:
    """The number under which a node token stands among the serials of certificates."""
    return int(token_id, 16)


def sign_pass(given: NodePass, tls: TlsFiles) -> bytes:
    """The pass as it travels, signed with the key of discovery's certificate.

    Raises:
        CorruptError: the key is not one of Cortex's.
    """
    key = load_pem_private_key(read_file(tls.key, "private key"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CorruptError(f"{tls.key} is not an elliptic-curve key")
    said = {
        "node": given.node.uri,
        "region": given.region,
        "gateway": given.gateway.uri,
        "sealing_key": given.sealing_key,
        "token_id": given.token_id,
        "issued_s": given.issued_s,
        "expires_s": given.expires_s,
    }
    chain = read_file(tls.certificate, "certificate").decode()
    signature = base64.b64encode(key.sign(_bytes(said), _ALGORITHM)).decode()
    return json.dumps({"said": said, "chain": chain, "signature": signature}, separators=(",", ":")).encode()


def read_pass(data: bytes, roots: bytes, now_s: float) -> NodePass:
    """What a pass says, after its signature, and that of discovery's certificate, was checked; not whether it expired.

    Args:
        data: As it travelled.
        roots: Of the network, PEM.
        now_s: Wall time, for the certificates.

    Raises:
        UnauthenticatedError: not a pass, or not one that the network's discovery signed.
    """
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{len(data)} bytes")
        document = json.loads(data)
        said, chain = document["said"], str(document["chain"]).encode()
        signature = base64.b64decode(str(document["signature"]), validate=True)
        key_of_chain(chain, roots, now_s).verify(signature, _bytes(said), _ALGORITHM)
        given = _read(said)
    except (UnauthenticatedError, InvalidSignature):
        raise UnauthenticatedError("the pass is not signed by this network's discovery", "pass") from None
    except (KeyError, RecursionError, OverflowError, InvalidArgumentError, *UNREADABLE) as error:
        raise UnauthenticatedError(f"not a pass of a node: {error}", "pass") from None
    signer = read_certificate(chain).identity
    if signer.role is not Role.DISCOVERY or signer.network != given.node.network:
        raise UnauthenticatedError(f"a pass signed by {signer.uri}; allowed: discovery of the network", "pass")
    return given


def _read(said: Mapping[str, Any]) -> NodePass:
    return NodePass(
        Identity.parse(str(said["node"])),
        str(said["region"]),
        Identity.parse(str(said["gateway"])),
        str(said["sealing_key"]),
        str(said["token_id"]),
        float(said["issued_s"]),
        float(said["expires_s"]),
    )


def _bytes(said: Mapping[str, Any]) -> bytes:
    return b"cortex.v1 node pass\n" + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
