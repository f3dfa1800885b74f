"""What discovery says of who belongs to the network, read by a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import CorruptError, UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.network.enrolment import check_answer
from cortex_common.network.membership import Membership, kept_denials, trust_of
from cortex_common.pb.v1 import identity_pb2

EVE = Identity("cortex", Role.WORKER, NodeName("eve"))


@pytest.fixture
def tls(tls_of) -> TlsFiles:
    return tls_of(Role.WORKER, "w1")


def answer(**changes: object) -> identity_pb2.WatchTrustResponse:
    said = identity_pb2.WatchTrustResponse()
    said.denials.add(**({"identity": EVE.uri, "serials": ["ab"], "reason": "lost", "at": {"seconds": 9}} | changes))
    return said


def test_a_denial_is_read_as_it_was_said(tls: TlsFiles) -> None:
    said = answer()
    said.roots = tls.ca.read_bytes()
    (denial,), roots = trust_of(said)
    assert (denial.identity, denial.serials, denial.reason, denial.at_s) == (EVE, {0xAB}, "lost", 9.0)
    assert roots == tls.ca.read_bytes()


@pytest.mark.parametrize("changes", [{"serials": ["none"]}, {"identity": "eve"}, {"at": {"seconds": 1 << 60}}])
def test_what_discovery_says_is_not_acted_on_when_it_cannot_be_read(changes: dict[str, object]) -> None:
    with pytest.raises(CorruptError, match="denial that cannot be read"):
        trust_of(answer(**changes))


def test_roots_that_are_none_do_not_replace_those_there_are(tls: TlsFiles) -> None:
    with pytest.raises(CorruptError, match="not a bundle"):
        trust_of(identity_pb2.WatchTrustResponse(roots=b"none"))
    own = Identity.parse("spiffe://cortex/worker/w1")
    given = identity_pb2.EnrollResponse(certificate=tls.certificate.read_bytes(), roots=tls.ca.read_bytes())
    check_answer(given, own)
    with pytest.raises(UnauthenticatedError, match="asked for was"):
        check_answer(given, EVE)
    given.roots = b""
    with pytest.raises(CorruptError, match="not a bundle"):
        check_answer(given, own)


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"denials":[{}]}', b'{"denials":[]', b'[{"identity":"eve"}]'])
def test_a_file_of_denials_that_is_damaged_is_found(data: bytes) -> None:
    with pytest.raises(CorruptError):
        kept_denials(data)


def test_denials_that_could_not_be_written_are_written_the_next_time(tls: TlsFiles, tmp_path: Path) -> None:
    kept = tmp_path / "state" / "denials.json"
    membership = Membership(tls, None, kept, SystemClock())
    with pytest.raises(FileNotFoundError):
        membership._take(answer())
    assert membership.denied.denials, "it counts at once, kept or not"
    kept.parent.mkdir()
    membership._take(answer())
    assert [each.identity for each in kept_denials(kept.read_bytes())] == [EVE]
