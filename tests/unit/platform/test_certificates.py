"""Certificates and the authority that issues them."""

from __future__ import annotations

import datetime as dt
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cortex_common.clock import SystemClock
from cortex_common.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.rpc.tls import current_material
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of, read_certificate, write_tls

WORKER = Identity("cortex", Role.WORKER, NodeName("eu-1"))


def test_an_issued_certificate_carries_its_identity_and_hosts(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue(WORKER, ["worker.example", "10.0.0.7"], tmp_path)
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cortex/worker/eu-1"]
    assert names.get_values_for_type(x509.DNSName) == ["worker.cortex.internal", "worker.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    leaf, issuing = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(x509.load_pem_x509_certificate(files.ca.read_bytes()))
    assert certificate_of(files).identity == WORKER


def test_keys_are_readable_by_their_owner_only(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue(WORKER, [], tmp_path)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert authority.key.stat().st_mode & 0o777 == 0o600


def test_a_certificate_starts_five_minutes_ago_and_lives_as_asked(authority: Authority, tmp_path: Path) -> None:
    certificate = certificate_of(authority.issue(WORKER, [], tmp_path, life=dt.timedelta(hours=2)))
    now = dt.datetime.now(dt.UTC)
    assert dt.timedelta(minutes=4) < now - certificate.not_before < dt.timedelta(minutes=6)
    assert certificate.seconds_left(time.time()) == pytest.approx(7200, abs=30)


def test_issuing_again_replaces_the_files(authority: Authority, tmp_path: Path) -> None:
    first = certificate_of(authority.issue(WORKER, [], tmp_path))
    second = certificate_of(authority.issue(WORKER, [], tmp_path))
    assert first.serial != second.serial
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "tls.crt", "tls.key"]


def test_an_authority_can_be_loaded_again(tmp_path: Path) -> None:
    made = Authority.create("lab", tmp_path / "ca")
    assert Authority.load(tmp_path / "ca") == made
    with pytest.raises(AlreadyExistsError):
        Authority.create("lab", tmp_path / "ca")


def test_an_authority_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="authority certificate"):
        Authority.load(tmp_path)


def test_an_authority_signs_for_its_own_network_only(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="not in this authority's network 'cortex'"):
        authority.issue(Identity("other", Role.WORKER, NodeName("w")), [], tmp_path)


def test_what_is_no_certificate_is_refused(authority: Authority) -> None:
    with pytest.raises(UnauthenticatedError, match="cannot be read"):
        read_certificate(b"nonsense")
    with pytest.raises(UnauthenticatedError):
        read_certificate(authority.ca.read_bytes())


@pytest.mark.parametrize("renames", range(4))
def test_a_replacement_that_is_killed_between_two_files_leaves_a_certificate_with_its_key(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    files, new = authority.issue(WORKER, [], tmp_path / "w"), authority.issue(WORKER, [], tmp_path / "new")
    serials = [certificate_of(each).serial for each in (files, new)]
    left = iter(range(renames))
    rename = Path.replace

    def until_killed(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise SystemExit("killed")
        return rename(path, target)

    with monkeypatch.context() as killed, suppress(SystemExit):
        killed.setattr(Path, "replace", until_killed)
        write_tls(files, *(each.read_bytes() for each in (new.ca, new.certificate, new.key)))
    assert current_material(files, SystemClock()).leaf.serial == serials[renames >= 2]
    # What begins next finds them whole too.
    assert certificate_of(files).serial == serials[renames >= 2]


def test_a_key_without_its_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    files, other = authority.issue(WORKER, [], tmp_path / "w"), authority.issue(WORKER, [], tmp_path / "other")
    files.key.write_bytes(other.key.read_bytes())
    files.certificate.with_name(".tls.crt.17").write_bytes(b"not a certificate")
    files.certificate.with_name(".tls.crt.18").write_bytes(files.certificate.read_bytes())
    with pytest.raises(InvalidArgumentError, match="does not belong to certificate"):
        current_material(files, SystemClock())
