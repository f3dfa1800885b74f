"""X.509 certificates that carry a node's identity: what Cortex reads in them, and the files they lie in."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError, NotFoundError, UnauthenticatedError
from cortex_common.identity import INTERNAL_DOMAIN, Identity, TlsFiles
from cortex_common.security.issuing import CLOCK_SKEW, UNREADABLE, load_key, public_pem, staged_copies, write_files


@dataclass(frozen=True, slots=True)
class Certificate:
    """What Cortex reads in a certificate: whose it is and how long it holds."""

    identity: Identity
    not_before: dt.datetime
    not_after: dt.datetime
    serial: int

    @property
    def life_s(self) -> float:
        """From when it was made (its start is set back for slow clocks) until it expires."""
        return (self.not_after - self.not_before - CLOCK_SKEW).total_seconds()

    def seconds_left(self, now_s: float) -> float:
        """Seconds until it expires at wall time `now_s`; negative once it has."""
        return self.not_after.timestamp() - now_s


@lru_cache(maxsize=4096)
def read_certificate(pem: bytes) -> Certificate:
    """Identity and life of the first certificate in `pem`.

    Raises:
        UnauthenticatedError: not a certificate, or it does not hold exactly one Cortex identity.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE as error:
        raise UnauthenticatedError(f"certificate cannot be read: {error}") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise UnauthenticatedError(f"certificate holds {len(uris)} URI names; exactly one spiffe:// id is allowed")
    try:
        identity = Identity.parse(uris[0])
    except InvalidArgumentError as error:
        raise UnauthenticatedError(f"certificate refused: {error}") from error
    return Certificate(
        identity, certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.serial_number
    )


def hosts_of(pem: bytes) -> tuple[str, ...]:
    """The host names and addresses in the first certificate of `pem`, but for the one of its role."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = [name for name in names.get_values_for_type(x509.DNSName) if not name.endswith(f".{INTERNAL_DOMAIN}")]
    return (*hosts, *(str(address) for address in names.get_values_for_type(x509.IPAddress)))


def read_file(path: Path, what: str) -> bytes:
    """Bytes of a TLS file.

    Raises:
        NotFoundError: cannot be read; says what it is for and where it was looked for.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{what} {path} cannot be read: {error.strerror or error}") from error


def certificate_of(tls: TlsFiles) -> Certificate:
    """The certificate a process presents.

    Raises:
        NotFoundError: the file cannot be read.
        UnauthenticatedError: not a Cortex certificate.
    """
    return read_certificate(read_file(tls.certificate, "certificate"))


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def fingerprints(bundle: bytes) -> tuple[str, ...]:
    """SHA-256 of every certificate in a PEM bundle.

    Raises:
        CorruptError: no certificates.
    """
    try:
        return tuple(fingerprint_of(each) for each in x509.load_pem_x509_certificates(bundle))
    except UNREADABLE as error:
        raise CorruptError(f"not a bundle of certificates: {error}") from error


def pinned(bundle: bytes, fingerprint: str) -> bytes:
    """The one certificate of a bundle that has this fingerprint, as PEM.

    Raises:
        UnauthenticatedError: it is not there.
    """
    for certificate in x509.load_pem_x509_certificates(bundle) if fingerprints(bundle) else ():
        if fingerprint_of(certificate) == fingerprint:
            return public_pem(certificate)
    raise UnauthenticatedError(f"no authority there has the fingerprint {fingerprint}")


def key_of_chain(chain: bytes, roots: bytes, at_s: float) -> ec.EllipticCurvePublicKey:
    """The key of the first certificate of a chain, which led up to one of the roots at that time.

    Args:
        chain: A node's certificate and the authorities above it, PEM.
        roots: PEM; those that had not begun, or had ended, do not count.
        at_s: Wall time.

    Raises:
        UnauthenticatedError: it did not.
        ValueError, TypeError: not certificates, or its key is not on an elliptic curve.
    """
    leaf, *above = x509.load_pem_x509_certificates(chain)
    at = dt.datetime.fromtimestamp(at_s, dt.UTC)
    known = x509.load_pem_x509_certificates(roots)
    good = [root for root in known if root.not_valid_before_utc <= at <= root.not_valid_after_utc]
    if not good:
        raise UnauthenticatedError("no root is known that was good at that time")
    try:
        verifier = PolicyBuilder().store(Store(good)).time(at.replace(tzinfo=None)).build_client_verifier()
        verifier.verify(leaf, above)
    except VerificationError:
        raise UnauthenticatedError("the certificate leads up to no known root that was good at that time") from None
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("its key is not on an elliptic curve")
    return key


def write_tls(files: TlsFiles, bundle: bytes, chain: bytes, key: bytes) -> None:
    """Replace a node's certificate, key and trusted roots."""
    for folder in {path.parent for path in (files.ca, files.certificate, files.key)}:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_files([(files.ca, bundle, 0o644), (files.key, key, 0o600), (files.certificate, chain, 0o644)])


def complete_tls(files: TlsFiles) -> bool:
    """Put a certificate beside its key, if a process was killed between the two; whether that was so.

    `write_tls` replaces the key first: its certificate then lies there still under the name it was written under.
    """
    try:
        key = load_key(read_file(files.key, "private key"), str(files.key)).public_key()
        for path in (files.certificate, *staged_copies(files.certificate)):
            chain = path.read_bytes()
            if _holds(chain, key):
                if path != files.certificate:
                    write_files([(files.certificate, chain, 0o644)])
                return path != files.certificate
    except (CortexError, OSError):
        pass
    return False


def _holds(chain: bytes, key: ec.EllipticCurvePublicKey) -> bool:
    """Whether the first certificate of a chain is that of a key."""
    try:
        return x509.load_pem_x509_certificate(chain).public_key() == key
    except UNREADABLE:
        return False
