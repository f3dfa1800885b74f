"""`cortex audit`: what was recorded, and whether it is as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex.cli.main import main
from cortex_common.identity import Role
from cortex_common.security.audit import AuditLog, Entry, Head
from cortex_common.security.signed_heads import HEADS_FILE, add_head, sign_head

ANN, EVE = "spiffe://cortex/operator/ann", "spiffe://cortex/worker/eve"
CANCEL = "/cortex.v1.JobService/CancelJob"


@pytest.fixture
def run(capsys):
    """Run a command: its exit code, what it printed, what it complained of."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["audit", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "coordinator" / "audit"


@pytest.fixture
def log(folder: Path) -> AuditLog:
    """Three records: allowed, refused, allowed."""
    made = AuditLog(folder)
    made.append(Entry(ANN, CANCEL, "allowed", "OK", about="job_id=j1"), 1000.0)
    made.append(Entry(EVE, CANCEL, "refused", "FORBIDDEN", reason="worker 'eve' may not", repeats=4), 1001.0)
    made.append(Entry(ANN, "/cortex.v1.IdentityService/RevokeNode", "allowed", "OK", about="name=eve"), 1002.0)
    return made


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


def test_an_untouched_log_is_whole(run, folder, log, tls_of):
    add_head(folder / HEADS_FILE, sign_head(log.head, tls_of(Role.COORDINATOR), 1003.0))
    code, out, _ = run("verify", "--log", str(folder))
    assert (code, out) == (0, "coordinator: records 1 to 3, 1 signed heads: whole\n")


CHANGES = {
    "a record changed": (lambda old: [old[0].replace(b"j1", b"j2"), *old[1:]], "record 1 was changed"),
    "a record removed": (lambda old: [old[0], old[2]], "record 3 does not follow record 1"),
    "records exchanged": (lambda old: [old[1], old[0], old[2]], "record 1 does not follow record 2"),
    "a record twice": (lambda old: [*old, old[2]], "record 3 does not follow record 3"),
    "no record": (lambda old: [*old, b"nonsense\n"], "a line is no audit record"),
    "the end cut off": (lambda old: old[:2], "record 3 was signed and is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_is_found(run, folder, log, tls_of, kind):
    add_head(folder / HEADS_FILE, sign_head(log.head, tls_of(Role.COORDINATOR), 1003.0))
    change, found = CHANGES[kind]
    rewrite(folder, change(lines(folder)))
    code, out, _ = run("verify", "--log", str(folder), "--json")
    assert code == 1
    assert found in "; ".join(json.loads(out)["coordinator"]["problems"])


def test_a_log_written_anew_contradicts_the_signed_head(run, folder, log, tls_of):
    add_head(folder / HEADS_FILE, sign_head(log.head, tls_of(Role.COORDINATOR), 1003.0))
    rewrite(folder, [])
    forged = AuditLog(folder)
    for number in range(3):
        forged.append(Entry(ANN, CANCEL, "allowed", "OK", about=f"job_id=other-{number}"), 1000.0)
    code, out, _ = run("verify", "--log", str(folder))
    assert code == 1
    assert "record 3 is not the one whose hash was signed" in out


def test_a_forged_head_is_found(run, folder, log, tls_of):
    statement = dict(sign_head(log.head, tls_of(Role.COORDINATOR), 1003.0))
    for forged in (statement | {"number": 2}, statement | {"by": ANN}, statement | {"certificate": "none"}):
        (folder / HEADS_FILE).write_text(json.dumps(forged) + "\n")
        code, out, err = run("verify", "--log", str(folder))
        assert code == 1, (out, err)
    (folder / HEADS_FILE).write_text("[]\n")
    assert run("verify", "--log", str(folder))[0] == 1


def test_a_log_cut_short_by_a_crash_goes_on_whole(run, folder, log):
    path = next(folder.glob("audit-*.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"number": 4, "at"')
    again = AuditLog(folder)
    assert again.head == Head(3, log.head.hash)
    again.append(Entry(ANN, CANCEL, "allowed", "OK"), 1004.0)
    assert run("verify", "--log", str(folder))[:2] == (0, "coordinator: records 1 to 4, 0 signed heads: whole\n")


def test_a_missing_log_is_told(run, tmp_path):
    code, _, err = run("verify", "--log", str(tmp_path / "nowhere"))
    assert code != 0
    assert "no audit log at" in err
