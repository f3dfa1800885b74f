"""What a server signs of its audit log, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import CorruptError
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.auditing import auditing
from cortex_common.security.audit import AuditLog, Entry, Head, read_log, segments_of
from cortex_common.security.audit_proof import Trust, prove_log
from cortex_common.security.authority import Authority
from cortex_common.security.signed_heads import HEADS_FILE, heads_elsewhere, read_heads, sign_head
from tests.fakes import ManualClock
from tests.waiting import eventually

ENTRY = Entry("spiffe://cortex/operator/ann", "/cortex.v1.JobService/CancelJob", "allowed", "OK")


@pytest.fixture
def clock() -> ManualClock:
    """Certificates hold now."""
    return ManualClock(SystemClock().wall_s())


@pytest.fixture
def trust(authority: Authority) -> Trust:
    return Trust(authority.bundle, lambda *_: False, SystemClock().wall_s())


async def test_an_empty_log_is_signed_at_the_start_so_that_one_that_was_emptied_is_known(
    tmp_path: Path, tls_of: Any, clock: ManualClock, trust: Trust
) -> None:
    assert prove_log(tmp_path, None, trust).problems == [
        "there are no records and no signed head, as a service signs at its start"
    ]
    async with auditing(tmp_path, tls_of(Role.COORDINATOR), clock):
        await eventually((tmp_path / HEADS_FILE).exists, 30)
    proof = prove_log(tmp_path, None, trust)
    assert (proof.problems, proof.unproven, proof.heads, proof.signed_up_to) == ([], [], 1, 0)


async def test_what_a_killed_service_left_unsigned_it_signs_when_it_starts_again(
    tmp_path: Path, tls_of: Any, clock: ManualClock, trust: Trust
) -> None:
    AuditLog(tmp_path).append(ENTRY, clock.wall_s() - 86400)
    assert "record 1 is covered by no signed head" in prove_log(tmp_path, None, trust).problems[0]
    async with auditing(tmp_path, tls_of(Role.COORDINATOR), clock):
        await eventually((tmp_path / HEADS_FILE).exists, 30)
    assert prove_log(tmp_path, None, trust).problems == []


async def test_a_head_is_logged_as_it_can_be_given_to_a_check_later(
    tmp_path: Path, tls_of: Any, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    AuditLog(tmp_path).append(ENTRY, clock.wall_s())
    async with auditing(tmp_path, tls_of(Role.COORDINATOR), clock):
        await eventually((tmp_path / HEADS_FILE).exists, 30)
    logged = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    (tmp_path / "collected").write_text("".join(f"{json.dumps(line)}\n" for line in logged))
    [collected], [kept] = heads_elsewhere(tmp_path / "collected"), read_heads(tmp_path / HEADS_FILE)
    assert {name: collected[name] for name in ("by", "number", "hash", "at_s", "signature")} == {
        name: said for name, said in kept.items() if name != "certificate"
    }


async def test_that_old_records_were_removed_is_signed_at_once(
    tmp_path: Path, tls_of: Any, clock: ManualClock, trust: Trust
) -> None:
    full = AuditLog(tmp_path, segment_bytes=1, segments=16)
    for _ in range(16):
        full.append(ENTRY, clock.wall_s())
    # The next record begins a file of its own, as after 4 MiB.
    last = segments_of(tmp_path)[-1]
    padding = Entry("", "padding", "allowed", "OK", reason="x" * (4 << 20))
    AuditLog(tmp_path).append(padding, clock.wall_s())
    assert last.stat().st_size > 4 << 20
    async with auditing(tmp_path, tls_of(Role.COORDINATOR), clock) as auditor:
        auditor.did("erase key", "key=1", "old")
        await eventually(lambda: any(head["number"] == 19 for head in read_heads(tmp_path / HEADS_FILE)), 30)
        proof = prove_log(tmp_path, None, trust)
    assert (proof.first, proof.last, proof.signed_up_to) == (2, 19, 19)
    assert proof.problems == []


def test_nothing_is_signed_with_another_key_than_the_certificates(tmp_path: Path, tls_of: Any) -> None:
    """As between the renames of a renewal: nobody would believe such a head."""
    ours, others = tls_of(Role.COORDINATOR), tls_of(Role.GATEWAY)
    with pytest.raises(CorruptError, match="is not the key of"):
        sign_head(Head(), TlsFiles(ours.ca, ours.certificate, others.key), SystemClock().wall_s())
    (tmp_path / "tls.crt").write_text("nothing")
    with pytest.raises(CorruptError, match="is no certificate"):
        sign_head(Head(), TlsFiles(ours.ca, tmp_path / "tls.crt", ours.key), SystemClock().wall_s())


class Asked:
    """A privileged call of somebody."""

    def __init__(self, who: str, peer: str = "ipv4:192.0.2.1:1") -> None:
        self.who = who
        self.peer = peer

    def entry(self, decision: str, code: str, reason: str = "") -> Entry:
        return Entry(self.who, "/cortex.v1.IdentityService/Renew", decision, code, reason=reason, peer=self.peer)


@pytest.mark.parametrize("who", ["spiffe://cortex/worker/eve", ""])
async def test_calls_that_come_to_nothing_do_not_push_the_other_records_out(
    tmp_path: Path, tls_of: Any, clock: ManualClock, who: str
) -> None:
    """Whoever may call, and strangers who may enrol, could fill the log with their mistakes, from wherever."""
    async with auditing(tmp_path, tls_of(Role.COORDINATOR), clock) as auditor:
        for number in range(500):
            await auditor.done(Asked(who, f"ipv4:192.0.2.{number % 200}:1"), "INVALID_ARGUMENT", "csr: not one")
        await auditor.done(Asked("spiffe://cortex/operator/ann"), "INVALID_ARGUMENT", "another one's mistake")
        await auditor.done(Asked(who), "OK")
        records = list(read_log(tmp_path))
        assert [each.get("who", "") for each in records[-2:]] == ["spiffe://cortex/operator/ann", who]
        assert len(records) < 110

        await clock.advance(60)
        await auditor.settle()
        mistakes = [each for each in read_log(tmp_path) if each["code"] == "INVALID_ARGUMENT"]
        told = [each for each in mistakes if each.get("who", "") == who]
        assert sum(1 + each.get("repeats", 0) for each in told) >= 500, "how many there were is told"
