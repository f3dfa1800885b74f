"""Roots and issuing authorities that replace themselves: nobody who is up to date, or a little late, is locked out."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.errors import InvalidArgumentError, PreconditionError, UnauthenticatedError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority, Lives
from cortex_common.security.certificates import fingerprints, pinned
from cortex_common.security.issuing import make_request, requested_key, write_files

SECOND = dt.timedelta(seconds=1)
LIVES = Lives(leaf=20 * SECOND, issuing=40 * SECOND, root=80 * SECOND)
WORKER = Identity("cortex", Role.WORKER, NodeName("eu-1"))


def later(seconds: float) -> dt.datetime:
    """So long after now: what a test has just made began about now."""
    return dt.datetime.now(dt.UTC) + seconds * SECOND


def verify(chain: bytes, bundle: bytes, at: dt.datetime) -> None:
    """What TLS does with a peer's certificates."""
    leaf, *above = x509.load_pem_x509_certificates(chain)
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(at).build_server_verifier(x509.DNSName("worker.cortex.internal"))
    verifier.verify(leaf, above)


def signed(authority: Authority) -> bytes:
    return authority.sign(make_request("eu-1")[1], WORKER, [], LIVES.leaf)


def test_a_certificate_leads_to_the_root_through_the_issuing_authority(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    chain = signed(authority)
    assert len(x509.load_pem_x509_certificates(chain)) == 2
    verify(chain, authority.bundle, later(0))
    with pytest.raises(VerificationError):
        verify(chain, Authority.create("cortex", tmp_path / "other", LIVES).bundle, later(0))


def test_nothing_is_made_before_its_time(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    assert authority.rotate(LIVES, later(5)) == ()
    assert authority.next_rotation() > later(5)


def test_the_issuing_authority_is_replaced_at_half_of_its_life_under_the_same_root(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    before, bundle = signed(authority), authority.bundle
    assert authority.rotate(LIVES, later(30)) == ("issuing",)
    after = signed(authority)
    assert authority.bundle == bundle
    assert x509.load_pem_x509_certificates(before)[1] != x509.load_pem_x509_certificates(after)[1]
    verify(before, bundle, later(0))
    verify(after, bundle, later(0))
    assert len(list(tmp_path.glob("issuing-*.key"))) == 1


def test_a_new_root_is_trusted_by_who_knows_only_the_old_one_and_the_other_way_round(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    old_chain, old_bundle, old_root = signed(authority), authority.bundle, authority.fingerprint
    assert authority.rotate(LIVES, later(60)) == ("root", "issuing")
    new_chain, new_bundle = signed(authority), authority.bundle
    assert authority.fingerprint != old_root
    assert fingerprints(new_bundle) == (authority.fingerprint, old_root)
    for chain in (old_chain, new_chain):
        for bundle in (old_bundle, new_bundle, pinned(new_bundle, old_root)):
            verify(chain, bundle, later(0))
    verify(new_chain, pinned(new_bundle, authority.fingerprint), later(0))
    assert len(list(tmp_path.glob("root-*.key"))) == 1


def test_roots_that_have_ended_are_trusted_no_more_and_kept_without_keys(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    first = authority.fingerprint
    for seconds in range(0, 400, 7):
        authority.rotate(LIVES, later(seconds))
        assert 1 <= len(fingerprints(authority.bundle)) <= 3
    assert first not in fingerprints(authority.bundle)
    ended = list(tmp_path.glob("ended-*"))
    assert {path.suffix for path in ended} == {".crt"}
    assert len(ended) > 5
    assert first in fingerprints(authority.every_root)
    assert len(fingerprints(authority.every_root)) == len(fingerprints(authority.bundle)) + len(ended)
    assert len(list(tmp_path.iterdir())) - len(ended) < 14


@settings(max_examples=15)
@given(steps=st.lists(st.sampled_from(["", "issuing", "root"]), min_size=1, max_size=6))
def test_whatever_the_order_of_rotations_every_living_leaf_is_trusted_by_every_living_node(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    authority = Authority.create("cortex", tmp_path_factory.mktemp("ca"), LIVES)
    living = [(signed(authority), authority.bundle)]
    for step in steps:
        authority.rotate(LIVES, later(0), force=step)
        living.append((signed(authority), authority.bundle))
    # Two roots may follow each other at once only by command: whoever is one rotation behind is still trusted.
    for (old_chain, old_bundle), (new_chain, new_bundle) in itertools.pairwise(living):
        verify(old_chain, new_bundle, later(0))
        verify(new_chain, old_bundle, later(0))


def test_a_root_whose_key_is_kept_elsewhere_is_not_rotated(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    authority.key.unlink()
    assert authority.rotate(LIVES, later(5)) == ()
    signed(authority)
    with pytest.raises(PreconditionError, match=r"root-0001\.key is not here"):
        authority.rotate(LIVES, later(30))
    signed(authority)


def test_an_authority_whose_roots_key_is_away_is_opened_and_signs_until_it_ends(tmp_path: Path) -> None:
    authority = Authority("cortex", tmp_path)
    authority.rotate(LIVES, later(-30))
    authority.key.unlink()
    verify(signed(Authority.open("cortex", tmp_path, LIVES)), authority.bundle, later(0))
    for path in tmp_path.glob("issuing-*"):
        path.unlink()
    with pytest.raises(PreconditionError, match=r"root-0001\.key is not here"):
        Authority.open("cortex", tmp_path, LIVES)


def test_a_first_versions_authority_is_taken_over_and_stays_trusted(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "cortex")])
    old = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(later(0))
        .not_valid_after(later(0) + dt.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "ca.pem").write_bytes(old.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "ca.key").write_text("secret")
    authority = Authority.open("cortex", tmp_path, LIVES)
    assert fingerprints(authority.bundle)[1:] == (old.fingerprint(hashes.SHA256()).hex(),)
    assert not (tmp_path / "ca.key").exists()
    verify(signed(authority), authority.bundle, later(0))
    assert Authority.open("cortex", tmp_path, LIVES) == authority
    assert len(fingerprints(authority.bundle)) == 2


def test_another_networks_directory_is_refused(tmp_path: Path) -> None:
    Authority.create("lab", tmp_path)
    with pytest.raises(PreconditionError, match="holds the authority of network 'lab'"):
        Authority.open("cortex", tmp_path)


def test_lives_that_leave_a_leaf_without_authority_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="twice the leaf's"):
        Lives(leaf=30 * SECOND, issuing=40 * SECOND, root=80 * SECOND)


def test_a_fingerprint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path)
    with pytest.raises(UnauthenticatedError, match="no authority there has the fingerprint"):
        pinned(authority.bundle, "00" * 32)


@pytest.mark.parametrize(
    "host",
    ["coordinator.cortex.internal", "COORDINATOR.Cortex.Internal.", "cortex.internal", "a b", "", "x" * 300, "*"],
)
def test_hosts_that_would_pass_for_a_role_or_are_none_are_refused(authority: Authority, host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="hosts: "):
        authority.sign(make_request("w")[1], WORKER, [host])


def test_requests_without_proof_of_their_key_are_refused() -> None:
    key, request = make_request("eu-1")
    assert requested_key(request) == serialization.load_pem_private_key(key, None).public_key()
    for junk in (b"", b"junk", request[:200], request * 100):
        with pytest.raises(InvalidArgumentError, match="csr: "):
            requested_key(junk)
    other = ed25519.Ed25519PrivateKey.generate()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(other, None)
    with pytest.raises(InvalidArgumentError, match="P-256"):
        requested_key(csr.public_bytes(serialization.Encoding.PEM))
    der = bytearray(x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER))
    der[-3] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InvalidArgumentError, match="csr: "):
        requested_key(forged)


@pytest.mark.parametrize("killed_at", range(3))
def test_a_rotation_that_was_killed_before_any_of_its_writes_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    authority = Authority.create("cortex", tmp_path, LIVES)
    old_bundle, writes = authority.bundle, itertools.count()

    def write_until_killed(files: Sequence[tuple[Path, bytes, int]]) -> None:
        if next(writes) == killed_at:
            raise KeyboardInterrupt
        write_files(files)

    with monkeypatch.context() as patched:
        patched.setattr("cortex_common.security.authority.write_files", write_until_killed)
        with pytest.raises(KeyboardInterrupt):
            authority.rotate(LIVES, later(0), force="root")
    again = Authority.open("cortex", tmp_path, LIVES)
    # By this fingerprint nodes that join know the network.
    assert pinned(again.bundle, again.fingerprint)
    for bundle in (old_bundle, again.bundle):
        verify(signed(again), bundle, later(0))
