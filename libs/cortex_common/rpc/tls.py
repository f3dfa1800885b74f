"""TLS credentials from files that may be replaced while the process runs."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from cortex_common.clock import Clock
from cortex_common.errors import InvalidArgumentError, NotFoundError, UnauthenticatedError
from cortex_common.identity import TlsFiles
from cortex_common.logging import get_logger
from cortex_common.rpc.identity import expired
from cortex_common.security.certificates import Certificate, complete_tls, read_certificate, read_file

_log = get_logger(__name__)
# A replacement takes three renames, one right after the other.
_READS = 5


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """The contents of one consistent set of TLS files."""

    ca: bytes
    certificate: bytes
    key: bytes

    @property
    def leaf(self) -> Certificate:
        """Identity and life of the certificate."""
        return read_certificate(self.certificate)


def read_material(tls: TlsFiles) -> TlsMaterial:
    """Read the files and make sure that they belong together; read again if they are being replaced just then.

    A replacement in whose middle a process was killed is done to its end first.

    Raises:
        NotFoundError: a file cannot be read.
        InvalidArgumentError: a file is no PEM of its kind, or key and certificate do not match.
        UnauthenticatedError: the certificate holds no Cortex identity.
    """
    for _ in range(_READS):
        stamp = files_stamp(tls)
        try:
            material = _read(tls)
        except (NotFoundError, InvalidArgumentError):
            if files_stamp(tls) == stamp and not complete_tls(tls):
                raise
        else:
            if files_stamp(tls) == stamp:
                return material
    return _read(tls)


def _read(tls: TlsFiles) -> TlsMaterial:
    material = TlsMaterial(
        read_file(tls.ca, "authority certificate"),
        read_file(tls.certificate, "certificate"),
        read_file(tls.key, "private key"),
    )
    _check_authority(tls, material)
    _check_key(tls, material)
    read_certificate(material.certificate)
    return material


def current_material(tls: TlsFiles, clock: Clock) -> TlsMaterial:
    """The files of a node about to connect; refused here, in words, where the peer's TLS would refuse them without any.

    Raises:
        UnauthenticatedError: the certificate has expired.
        NotFoundError, InvalidArgumentError: see `read_material`.
    """
    material = read_material(tls)
    if material.leaf.seconds_left(clock.wall_s()) <= 0:
        raise UnauthenticatedError(f"{tls.certificate}: {expired(material.leaf)}")
    return material


def client_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """What a channel needs to prove who it is and to check the server."""
    return grpc.ssl_channel_credentials(
        root_certificates=material.ca, private_key=material.key, certificate_chain=material.certificate
    )


class ReloadingServerCredentials:
    """Server credentials that look at the files again at each handshake.

    A set of files that is incomplete or does not fit together (caught in the middle of a replacement) is passed over:
    the last good one stays in use until the files are whole.
    """

    def __init__(self, tls: TlsFiles, clock: Clock) -> None:
        self._tls = tls
        self._stamp = files_stamp(tls)
        self._initial = _configuration(current_material(tls, clock))

    def credentials(self, *, is_mutual: bool = True) -> grpc.ServerCredentials:
        """For `add_secure_port`; clients must present a certificate, unless TLS is not `is_mutual`."""
        # The stubs know no None, which grpc documents as "no change".
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)
        return grpc.dynamic_ssl_server_credentials(self._initial, fetch, require_client_authentication=is_mutual)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, on a thread of its own."""
        stamp = files_stamp(self._tls)
        if stamp == self._stamp:
            return None
        try:
            material = read_material(self._tls)
        except (NotFoundError, InvalidArgumentError, UnauthenticatedError) as error:
            _log.warning("certificate_files_not_usable", reason=str(error))
            return None
        self._stamp = stamp
        _log.info(
            "certificate_reloaded", identity=material.leaf.identity.uri, until=material.leaf.not_after.isoformat()
        )
        return _configuration(material)


def files_stamp(tls: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever one of the files is written or replaced."""
    stamps = []
    for path in (tls.ca, tls.certificate, tls.key):
        try:
            stat = path.stat()
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return tuple(stamps)


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.certificate)], material.ca)


def _check_authority(tls: TlsFiles, material: TlsMaterial) -> None:
    try:
        x509.load_pem_x509_certificates(material.ca)
        ssl.create_default_context(cadata=material.ca.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise InvalidArgumentError(f"authority certificate {tls.ca} is not a PEM certificate: {error}") from error


def _check_key(tls: TlsFiles, material: TlsMaterial) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(material.certificate)
    except ValueError as error:
        raise InvalidArgumentError(f"certificate {tls.certificate} is not a PEM certificate: {error}") from error
    try:
        key = serialization.load_pem_private_key(material.key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidArgumentError(f"private key {tls.key} is not a usable PEM key: {error}") from error
    if key.public_key() != certificate.public_key():
        raise InvalidArgumentError(f"private key {tls.key} does not belong to certificate {tls.certificate}")
