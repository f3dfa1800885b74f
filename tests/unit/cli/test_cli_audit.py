"""`cortex audit`: what was recorded, whether it is as it was written, and by whom that is signed."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from cortex.cli.main import main
from cortex_common.clock import SystemClock
from cortex_common.errors import UnauthenticatedError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.audit import AuditLog, Entry, Head, read_log, segments_of
from cortex_common.security.audit_check import check_log
from cortex_common.security.authority import Authority, Lives
from cortex_common.security.issuing import load_key
from cortex_common.security.signed_heads import HEADS_FILE, add_head, sign_head

ANN, EVE = "spiffe://cortex/operator/ann", "spiffe://cortex/worker/eve"
COORDINATOR = Identity("cortex", Role.COORDINATOR, NodeName("coordinator-1"))
CANCEL = "/cortex.v1.JobService/CancelJob"
# Certificates of tests begin minutes ago, records of an old log days ago.
OLD_S = SystemClock().wall_s() - 3 * 86400


def now_s() -> float:
    """A run may come here minutes after this file was read."""
    return SystemClock().wall_s()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command where no network is: its exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["audit", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def verify(run, folder, authority):
    """Check the log: the exit code, and what is said of it."""

    def verify(*more: str) -> tuple[int, dict]:
        code, out, err = run("verify", "--log", str(folder), "--roots", str(authority.ca), "--json", *more)
        return code, json.loads(out)["coordinator"] if out else {"problems": [err]}

    return verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "coordinator" / "audit"


def written(folder: Path, at_s: float = OLD_S, segment_bytes: int = 4 << 20) -> AuditLog:
    """Three records: allowed, refused, allowed."""
    made = AuditLog(folder, segment_bytes)
    made.append(Entry(ANN, CANCEL, "allowed", "OK", about="job_id=j1"), at_s)
    made.append(Entry(EVE, CANCEL, "refused", "FORBIDDEN", reason="worker 'eve' may not", repeats=4), at_s + 1)
    made.append(Entry(ANN, "/cortex.v1.IdentityService/RevokeNode", "allowed", "OK", about="name=eve"), at_s + 2)
    return made


@pytest.fixture
def log(folder: Path) -> AuditLog:
    return written(folder)


@pytest.fixture
def sign(tls_of) -> Callable[..., None]:
    """Sign the head of a log, as the service would."""

    def sign(log: AuditLog, tls: TlsFiles | None = None, head: Head | None = None, at_s: float = now_s()) -> None:
        add_head(log.directory / HEADS_FILE, sign_head(head or log.head, tls or tls_of(Role.COORDINATOR), at_s))

    return sign


def lines(folder: Path) -> list[bytes]:
    return next(folder.glob("audit-*.jsonl")).read_bytes().splitlines(keepends=True)


def rewrite(folder: Path, changed: list[bytes]) -> None:
    next(folder.glob("audit-*.jsonl")).write_bytes(b"".join(changed))


@pytest.mark.usefixtures("log")
def test_records_are_listed_oldest_first_and_filtered(run, folder):
    code, out, _ = run("list", "--log", str(folder), "--json")
    records = json.loads(out)
    assert (code, [record["number"] for record in records]) == (0, [1, 2, 3])
    assert {record["service"] for record in records} == {"coordinator"}
    assert [r["who"] for r in json.loads(run("list", "--log", str(folder), "--refused", "--json")[1])] == [EVE]
    assert len(json.loads(run("list", "--log", str(folder), "--who", "ann", "--json")[1])) == 2
    assert [r["number"] for r in json.loads(run("list", "--log", str(folder), "--last", "1", "--json")[1])] == [3]
    code, out, _ = run("list", "--log", str(folder))
    assert code == 0
    assert "JobService/CancelJob" in out
    assert "cortex/worker/eve" in out


def test_an_untouched_log_is_whole(run, folder, log, sign, authority):
    sign(log)
    whole = f"coordinator: records 1 to 3, 1 signed head by {COORDINATOR.uri}: whole\n"
    check = ("verify", "--log", str(folder), "--roots")
    assert run(*check, str(authority.ca))[:2] == (0, whole)
    assert run(*check, str(authority.directory), "--service", COORDINATOR.uri)[:2] == (0, whole)


CHANGES = {
    "a record changed": (lambda old: [old[0].replace(b"j1", b"j2"), *old[1:]], "record 1 was changed"),
    "a record removed": (lambda old: [old[0], old[2]], "record 3 does not follow record 1"),
    "records exchanged": (lambda old: [old[1], old[0], old[2]], "record 1 does not follow record 2"),
    "a record twice": (lambda old: [*old, old[2]], "record 3 does not follow record 3"),
    "no record": (lambda old: [*old, b"nonsense\n"], "a line is no audit record"),
    "the end cut off": (lambda old: old[:2], "record 3 was signed and is gone"),
    "the first line removed": (lambda old: old[1:], "the records before 2 are gone, and no record says that"),
    "everything removed": (lambda _: [], "record 3 was signed and is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_is_found(verify, folder, log, sign, kind):
    sign(log, head=Head(1, json.loads(lines(folder)[0])["hash"]))
    sign(log)
    change, found = CHANGES[kind]
    rewrite(folder, change(lines(folder)))
    code, told = verify()
    assert code == 1
    assert found in "; ".join(told["problems"])


def emptied(folder: Path, *_: TlsFiles) -> None:
    for path in folder.iterdir():
        path.unlink()


def headless(folder: Path, *_: TlsFiles) -> None:
    (folder / HEADS_FILE).unlink()


def forged(folder: Path, by: TlsFiles) -> None:
    """Another log in its place, its head signed by somebody."""
    emptied(folder)
    made = AuditLog(folder)
    for number in range(3):
        made.append(Entry(ANN, CANCEL, "allowed", "OK", about=f"job_id=other-{number}"), OLD_S)
    add_head(folder / HEADS_FILE, sign_head(made.head, by, now_s()))


FORGERIES = {
    "a log of a foreign authority": (forged, "foreign", "leads up to no known root that was good at that time"),
    "a log of a worker": (forged, "worker", "signed by spiffe://cortex/worker/worker-1, which keeps no audit log"),
    "the heads deleted": (headless, "", "records 1 to 3 are covered by no signed head since "),
    "the log emptied": (emptied, "", "there are no records and no signed head"),
    "the oldest segment removed": (
        lambda folder, _: segments_of(folder)[0].unlink(),
        "",
        "the records before 2 are gone",
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_every_forgery_is_found(verify, folder, sign, tls_of, tmp_path, kind):
    log = written(folder, segment_bytes=1)
    for record in read_log(folder):
        sign(log, head=Head(record["number"], record["hash"]))
    assert verify()[0] == 0
    forge, by, found = FORGERIES[kind]
    foreign = Authority.create("cortex", tmp_path / "foreign").issue(COORDINATOR, [], tmp_path / "theirs")
    forge(folder, foreign if by == "foreign" else tls_of(Role.WORKER))
    code, told = verify()
    assert code == 1
    assert found in "; ".join(told["problems"])


def test_a_log_signed_by_another_service_is_not_believed(run, verify, folder, log, sign, tls_of):
    sign(log, tls_of(Role.AGGREGATOR))
    code, told = verify("--service", COORDINATOR.uri)
    assert code == 1
    assert (
        f"signed by spiffe://cortex/aggregator/aggregator-1, and this is the log of {COORDINATOR.uri}"
        in told["problems"][0]
    )
    # Where nobody says whose log it is, the check says whose it seems to be; two cannot share one.
    assert verify()[1]["signed_by"] == "spiffe://cortex/aggregator/aggregator-1"
    sign(log)
    assert "a log has one service" in verify()[1]["problems"][0]
    assert "allowed: with one" in run("verify", "--service", COORDINATOR.uri)[2]


def test_who_has_no_roots_checks_nothing(run, folder, log, sign, monkeypatch, authority):
    sign(log)
    code, out, err = run("verify", "--log", str(folder))
    assert (code != 0, out) == (True, "")
    assert "no roots are known to check the signers by; allowed: --roots FILE" in err
    monkeypatch.setenv("CORTEX_CA", str(authority.ca))
    assert run("verify", "--log", str(folder))[0] == 0
    assert run("verify", "--log", str(folder), "--roots", str(folder / HEADS_FILE))[0] == 1


def test_heads_are_checked_by_roots_of_their_time(run, folder, log, sign, tmp_path):
    second = dt.timedelta(seconds=1)
    lives = Lives(leaf=20 * second, issuing=40 * second, root=80 * second)
    authority = Authority.create("cortex", tmp_path / "own", lives)
    sign(log, authority.issue(COORDINATOR, [], tmp_path / "tls", lives.leaf), at_s=now_s())
    root = authority.fingerprint
    for later in range(0, 400, 7):
        authority.rotate(lives, dt.datetime.now(dt.UTC) + later * second)
    assert authority.fingerprint != root
    assert not list(authority.directory.glob("ended-*.key"))
    check = ("verify", "--log", str(folder), "--roots")
    assert run(*check, str(authority.directory))[0] == 0
    code, out, _ = run(*check, str(authority.ca))
    assert code == 1
    assert "1 head is not believed: no root is known that was good at that time" in out


def test_a_head_signed_after_its_certificate_had_ended_counts_for_nothing(
    verify, folder, log, sign, authority, tmp_path
):
    ended = authority.issue(COORDINATOR, [], tmp_path / "tls", dt.timedelta(seconds=-60))
    with pytest.raises(UnauthenticatedError, match="the certificate holds from"):
        sign(log, ended)
    add_head(folder / HEADS_FILE, signed_by_an_earlier_version(log.head, ended))
    code, told = verify()
    assert code == 1
    assert told["problems"][0].startswith("records 1 to 3 are covered by no signed head since")
    assert told["unproven"] == ["1 head is of no use: signed with a certificate that had ended"]
    sign(log)
    assert verify()[0] == 0


def signed_by_an_earlier_version(head: Head, tls: TlsFiles) -> dict[str, object]:
    """Earlier versions signed with whatever certificate they had."""
    chain, key = tls.certificate.read_bytes(), load_key(tls.key.read_bytes(), "key")
    said = {"by": COORDINATOR.uri, "number": head.number, "hash": head.hash, "at_s": now_s()}
    data = b"cortex.v1 audit head\n" + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    signature = base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()
    return {**said, "certificate": chain.decode(), "signature": signature}


def test_a_young_log_is_believed_before_its_first_head(verify, folder):
    written(folder, now_s() - 5)
    code, told = verify()
    assert (code, told["unproven"]) == (0, ["records 1 to 3 are covered by no signed head yet"])


@pytest.mark.parametrize("at_s", [OLD_S, OLD_S + 4 * 86400])
def test_records_after_the_last_head_are_believed_for_as_long_as_one_may_be_on_its_way(verify, log, sign, at_s):
    sign(log)
    log.append(Entry(ANN, CANCEL, "allowed", "OK"), now_s())
    code, told = verify()
    assert (code, told["unproven"]) == (0, ["record 4 is covered by no signed head yet"])
    sign(log)
    log.append(Entry(ANN, CANCEL, "allowed", "OK"), at_s)
    log.append(Entry(ANN, CANCEL, "allowed", "OK"), now_s())
    code, told = verify()
    assert code == 1
    assert told["problems"][0].startswith("records 5 to 6 are covered by no signed head since ")


def test_what_a_full_log_removes_it_records_and_signs(verify, folder, sign):
    log = AuditLog(folder, segment_bytes=1, segments=3)
    for number in range(9):
        log.append(Entry(ANN, CANCEL, "allowed", "OK"), now_s() + number / 100)
    assert len(segments_of(folder)) == 3
    code, told = verify()
    assert code == 1
    assert "which says that others were removed" in told["problems"][0]
    sign(log)
    code, told = verify()
    assert (code, told["problems"], told["unproven"]) == (0, [], [])
    assert told["first"] > 1
    segments_of(folder)[0].unlink()
    code, told = verify()
    assert code == 1
    assert "are gone, and no record says that the service removed them" in told["problems"][0]


def test_a_log_that_an_earlier_version_filled_is_believed_and_what_it_removed_is_told(folder):
    log = AuditLog(folder, segment_bytes=1, segments=9)
    for number in range(6):
        log.append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S + number)
    for removed in segments_of(folder)[:3]:
        removed.unlink()
    assert "an earlier version" in check_log(folder, segment_bytes=1, segments=3).unproven[0]
    assert check_log(folder, segment_bytes=1, segments=3).problems == []
    # One that was not full has lost nothing by itself, nor has one of a version that records it.
    assert "the records before 4 are gone" in check_log(folder, segment_bytes=1, segments=4).problems[0]
    AuditLog(folder, segment_bytes=1, segments=3).append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S)
    assert check_log(folder, segment_bytes=1, segments=3).problems == []
    segments_of(folder)[0].unlink()
    assert "are gone" in check_log(folder, segment_bytes=1, segments=2).problems[0]


def test_a_record_that_could_not_be_written_leaves_the_log_as_it_was(folder):
    log = AuditLog(folder, segment_bytes=1, segments=2)
    for _ in range(2):
        log.append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S)
    begun = folder / "audit-000000000003.jsonl"
    begun.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        log.append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S)
    assert log.head.number == 2
    begun.rmdir()
    # As a full disk leaves it.
    begun.touch()
    log.append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S)
    assert check_log(folder).problems == []
    assert check_log(folder).first == 2


def test_heads_kept_elsewhere_are_checked_too(run, verify, folder, log, sign, tls_of, tmp_path):
    sign(log)
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes((folder / HEADS_FILE).read_bytes())
    collected = tmp_path / "collected.log"
    logged = {"event": "audit_head", "by": COORDINATOR.uri, "number": 3, "hash": log.head.hash, "at_s": now_s()}
    collected.write_text(f"plain text\n{json.dumps({'event': 'serving'})}\n{json.dumps(logged)}\n")
    for file in (kept, collected):
        code, told = verify("--heads", str(file))
        assert (code, told["signed_heads"]) == (0, 2)
    # The service itself may write another history and sign that.
    emptied(folder)
    forged(folder, tls_of(Role.COORDINATOR))
    assert verify()[0] == 0
    for file in (kept, collected):
        code, told = verify("--heads", str(file))
        assert code == 1
        assert "two heads say different things of record 3" in told["problems"]
    emptied(folder)
    assert "record 3 was signed and is gone" in verify("--heads", str(collected))[1]["problems"]
    assert "holds no head" in verify("--heads", str(tmp_path / "collected.log"), "--heads", __file__)[1]["problems"][0]
    other = verify("--heads", str(kept), "--service", "spiffe://cortex/gateway/gateway")[1]["problems"][0]
    assert f"heads of {COORDINATOR.uri} given; the logs are of spiffe://cortex/gateway/gateway" in " ".join(
        other.split()
    )


def test_a_log_written_anew_contradicts_the_signed_head(verify, folder, log, sign):
    sign(log)
    rewrite(folder, [])
    forged = AuditLog(folder)
    for number in range(3):
        forged.append(Entry(ANN, CANCEL, "allowed", "OK", about=f"job_id=other-{number}"), OLD_S)
    code, told = verify()
    assert code == 1
    assert "record 3 is not the one whose hash was signed" in told["problems"]


def test_a_forged_head_is_found(verify, folder, log, tls_of):
    statement = dict(sign_head(log.head, tls_of(Role.COORDINATOR), now_s()))
    for forged in (statement | {"number": 2}, statement | {"by": ANN}, statement | {"certificate": "none"}):
        (folder / HEADS_FILE).write_text(json.dumps(forged) + "\n")
        code, told = verify()
        assert code == 1
        assert told["problems"][0].startswith("1 head is not believed: ")
    for damaged in ("[]\n", "{\n"):
        (folder / HEADS_FILE).write_text(damaged)
        assert "a line is no signed head" in verify()[1]["problems"][0]


def test_a_log_cut_short_by_a_crash_goes_on_whole(verify, folder, log, sign):
    path = next(folder.glob("audit-*.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"number": 4, "at"')
    again = AuditLog(folder)
    assert again.head == Head(3, log.head.hash)
    again.append(Entry(ANN, CANCEL, "allowed", "OK"), OLD_S)
    sign(again)
    code, told = verify()
    assert (code, told["last"], told["problems"]) == (0, 4, [])


def test_a_missing_log_is_told(run, tmp_path):
    code, _, err = run("verify", "--log", str(tmp_path / "nowhere"))
    assert code != 0
    assert "no audit log at" in err
