"""X.509 certificates that carry a node's identity, and the authority that issues them."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cortex_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName

LEAF_LIFE = dt.timedelta(hours=24)
AUTHORITY_LIFE = dt.timedelta(days=3650)
# Clocks of two sites may differ by this much.
CLOCK_SKEW = dt.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What Cortex reads in a certificate: whose it is and how long it holds."""

    identity: Identity
    not_before: dt.datetime
    not_after: dt.datetime
    serial: int

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
    except (ValueError, x509.ExtensionNotFound) as error:
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


@dataclass(frozen=True, slots=True)
class Authority:
    """The network's certificate authority, kept in a directory: `ca.pem` (to hand out) and `ca.key` (to guard)."""

    network: str
    directory: Path

    @property
    def ca(self) -> Path:
        """The certificate every node trusts."""
        return self.directory / "ca.pem"

    @property
    def key(self) -> Path:
        """The private key, mode 0600."""
        return self.directory / "ca.key"

    @classmethod
    def create(cls, network: str, directory: Path, life: dt.timedelta = AUTHORITY_LIFE) -> Authority:
        """Make a new authority for `network` in `directory`.

        Raises:
            AlreadyExistsError: there is one already.
            InvalidArgumentError: the network's name is not allowed.
        """
        Identity(network, Role.OPERATOR, NodeName("authority"))  # refuses a bad network name
        authority = cls(network, directory)
        if authority.key.exists() or authority.ca.exists():
            raise AlreadyExistsError(f"{directory} already holds a certificate authority")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = _authority_certificate(network, key, life)
        _write(authority.key, _private_pem(key), 0o600)
        _write(authority.ca, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return authority

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """The authority kept in `directory`.

        Raises:
            NotFoundError: there is none.
            InvalidArgumentError: `ca.pem` is no Cortex authority.
        """
        pem = read_file(directory / "ca.pem", "authority certificate")
        try:
            names = x509.load_pem_x509_certificate(pem).subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        except ValueError as error:
            raise InvalidArgumentError(f"{directory / 'ca.pem'} is not a certificate: {error}") from error
        if len(names) != 1:
            raise InvalidArgumentError(f"{directory / 'ca.pem'} is not a Cortex authority: it names no network")
        return cls(str(names[0].value), directory)

    def issue(self, identity: Identity, hosts: Sequence[str], out: Path, life: dt.timedelta = LEAF_LIFE) -> TlsFiles:
        """Write a key and a certificate for `identity` into the folder `out`, next to a copy of the authority's.

        Args:
            identity: Whose certificate; its network must be the authority's.
            hosts: DNS names and IP addresses the node's server may be reached at.
            out: Folder for `ca.pem`, `tls.crt`, `tls.key`; files there are replaced.
            life: From now until it expires; the start is set 5 minutes back for slow clocks.

        Raises:
            InvalidArgumentError: the identity belongs to another network.
        """
        if identity.network != self.network:
            raise InvalidArgumentError(f"{identity.uri} is not in this authority's network {self.network!r}")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(identity, hosts, key.public_key(), life)
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        files = TlsFiles(out / "ca.pem", out / "tls.crt", out / "tls.key")
        _write(files.key, _private_pem(key), 0o600)
        _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(files.ca, self.ca.read_bytes(), 0o644)
        return files

    def _sign(
        self, identity: Identity, hosts: Sequence[str], key: ec.EllipticCurvePublicKey, life: dt.timedelta
    ) -> x509.Certificate:
        """A certificate for `key` with the identity as URI name."""
        issuer = x509.load_pem_x509_certificate(self.ca.read_bytes())
        issuer_key = serialization.load_pem_private_key(read_file(self.key, "authority key"), password=None)
        if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
            raise InvalidArgumentError(f"{self.key} is not an elliptic-curve key")
        now = dt.datetime.now(dt.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        names += [_host_name(host) for host in dict.fromkeys([identity.role.server_name, *hosts])]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(_name(identity.network, identity.name))
            .issuer_name(issuer.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + life) - CLOCK_SKEW)
            .not_valid_after(now + life)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )


def _authority_certificate(network: str, key: ec.EllipticCurvePrivateKey, life: dt.timedelta) -> x509.Certificate:
    """A self-signed certificate that may sign leaves only."""
    now = dt.datetime.now(dt.UTC)
    name = _name(network, f"{network} certificate authority")
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


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
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Replace `path` in one step; it never exists with wider permissions than `mode`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
