"""How Cortex certificates are built: roots, the issuing authorities below them, and leaves that carry an identity."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.identity import INTERNAL_DOMAIN, Identity

# Clocks of two sites may differ by this much.
CLOCK_SKEW = dt.timedelta(minutes=5)
MAX_HOSTS = 32
_HOST = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.?)+")
# What reading a certificate or a request that somebody else made may raise.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
_MAX_REQUEST_BYTES = 16 * 1024
Key = ec.EllipticCurvePrivateKey


def new_authority_key() -> Key:
    """A key for a root or an issuing authority."""
    return ec.generate_private_key(ec.SECP384R1())


def authority_certificate(
    network: str, kind: str, key: Key, issuer: tuple[x509.Certificate, Key] | None, ends: dt.datetime, now: dt.datetime
) -> x509.Certificate:
    """The certificate of an authority.

    Args:
        network: Whose authority.
        kind: `root` or `issuing`; part of its name. A root may sign one level of issuing authorities below it.
        key: Its own key.
        issuer: Who signs; None for itself. For a root: the cross-signature by an older root.
        ends: End of its life; the issuer's, if that is sooner.
        now: Start of its life, set back by the skew clocks may have.
    """
    fingerprint = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = _name(network, f"{network} {kind} {fingerprint.digest.hex()[:12]}")
    signer, signer_name = (key, name) if issuer is None else (issuer[1], issuer[0].subject)
    ends = ends if issuer is None else min(ends, issuer[0].not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(ends)
        # Above a leaf: the issuing authority, its root, and the older root that vouches for a new one.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0 if kind == "issuing" else 2), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(fingerprint, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )


def leaf_certificate(
    identity: Identity,
    hosts: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    issuer: tuple[x509.Certificate, Key],
    life: dt.timedelta,
    now: dt.datetime,
) -> x509.Certificate:
    """A node's certificate, with the identity as URI name; it never outlives its issuer's.

    Raises:
        InvalidArgumentError: a host name is not allowed.
    """
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [x509.DNSName(identity.role.server_name), *host_names(hosts)]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(_name(identity.network, identity.name))
        .issuer_name(issuer[0].subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + life) - CLOCK_SKEW)
        .not_valid_after(min(now + life, issuer[0].not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key()), critical=False)
        .sign(issuer[1], hashes.SHA256())
    )


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The names a node's server may be reached at, beside the one of its role.

    Raises:
        InvalidArgumentError: too many, no host name, or a name by which clients know a role.
    """
    if len(hosts) > MAX_HOSTS:
        raise InvalidArgumentError(f"hosts: {len(hosts)} given; allowed: up to {MAX_HOSTS}")
    return [_host_name(host) for host in dict.fromkeys(hosts)]


def make_request(name: str) -> tuple[bytes, bytes]:
    """A new key of a node, and the request (PKCS #10) that proves to an authority that the node has it.

    Returns:
        Both as PEM: the private key, which stays here, and the request.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return private_pem(key), request_for(private_pem(key), name)


def request_for(key_pem: bytes, name: str) -> bytes:
    """The request (PKCS #10, PEM) of a key that is there already.

    Raises:
        CorruptError: not an elliptic-curve key.
    """
    key = load_key(key_pem, "node key")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key in a request, whose sender has proven to own it. Everything else in it is passed over.

    Raises:
        InvalidArgumentError: not a request, of another kind of key, or its signature is wrong.
    """
    if len(request) > _MAX_REQUEST_BYTES:
        raise InvalidArgumentError(f"csr: {len(request)} bytes given; allowed: up to {_MAX_REQUEST_BYTES}")
    try:
        csr = x509.load_pem_x509_csr(request)
        key, is_valid = csr.public_key(), csr.is_signature_valid
    except UNREADABLE as error:
        raise InvalidArgumentError(f"csr: not a certificate request in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise InvalidArgumentError("csr: allowed are keys on the curves P-256 and P-384")
    if not is_valid:
        raise InvalidArgumentError("csr: its signature is not by its own key")
    return key


def key_digest(request: bytes) -> str:
    """SHA-256 of the key in a request.

    Raises:
        InvalidArgumentError: see `requested_key`.
    """
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(requested_key(request).public_bytes(serialization.Encoding.DER, form)).hexdigest()


def private_pem(key: Key) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_key(pem: bytes, what: str) -> Key:
    """A private key from PEM.

    Raises:
        CorruptError: not an elliptic-curve key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CorruptError(f"{what} is not a usable PEM key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CorruptError(f"{what} is not an elliptic-curve key")
    return key


def write_files(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Replace several files by (path, content, mode), one right after the other once all are written and synced.

    Who reads in between finds old and new ones side by side, for the time of a few renames.
    """
    staged = [(_staged(path, data, mode), path) for path, data, mode in files]
    for temporary, path in staged:
        temporary.replace(path)
    for folder in {path.parent for path, _, _ in files}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def staged_copies(path: Path) -> list[Path]:
    """What `write_files` had written to replace a file when it was killed."""
    return sorted(path.parent.glob(f".{path.name}.*"))


def _staged(path: Path, data: bytes, mode: int) -> Path:
    """The new content beside the old; it never exists with wider permissions than `mode`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _name(network: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, network),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    """Usage bits of a leaf (`signs`: handshakes) or of an authority (certificates)."""
    return x509.KeyUsage(
        digital_signature=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not signs,
        crl_sign=not signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    # By these names clients know what role answers: nobody gets another role's.
    if f".{host.lower().rstrip('.')}".endswith(f".{INTERNAL_DOMAIN}"):
        raise InvalidArgumentError(f"hosts: {host!r} given; names below {INTERNAL_DOMAIN} are the roles' own")
    if not _HOST.fullmatch(host):
        raise InvalidArgumentError(f"hosts: {host[:80]!r} given; allowed: DNS names and IP addresses")
    return x509.DNSName(host)
