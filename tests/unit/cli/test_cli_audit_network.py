"""`cortex audit verify` for a network on this machine: every log that should be there, each by its own service."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cortex.cli.main import main
from cortex.local.layout import Layout
from cortex.local.members import members_of
from cortex.local.network import LocalNetwork, write_network
from cortex_common.clock import SystemClock
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.audit import AuditLog, Entry, read_log
from cortex_common.security.audit_proof import SEEN_HEAD, about_head
from cortex_common.security.authority import Authority
from cortex_common.security.signed_heads import HEADS_FILE, add_head, sign_head
from cortex_common.security.tokens import TokenStore
from cortex_common.storage.checked import to_checked_json
from tests.fakes import ManualClock

OLD_S = SystemClock().wall_s() - 3 * 86400
NETWORK = LocalNetwork(members=members_of(["eu"], 1))
SERVICES = {member.name: member.service for member in NETWORK.members if member.service is not Role.WORKER}


def now_s() -> float:
    """A run may come here minutes after this file was read."""
    return SystemClock().wall_s()


def identity_of(name: str) -> Identity:
    return Identity("cortex", SERVICES[name], NodeName(name))


class Network:
    """What `cortex up` leaves: a log for each service, one for the tokens, and the authority."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        write_network(layout, NETWORK)
        self.authority = Authority.create("cortex", layout.authority)
        self.tokens = TokenStore(layout.tokens_file, ManualClock(OLD_S))
        self.tokens.create("me", ["admin"])
        for name in SERVICES:
            log = self.log(name)
            log.append(Entry("spiffe://cortex/operator/ann", "/cortex.v1.Any/Call", "allowed", "OK"), OLD_S)
            self.sign(name)

    def log(self, name: str) -> AuditLog:
        return AuditLog(self.layout.state(name) / "audit")

    def tls(self, name: str) -> TlsFiles:
        files = self.layout.tls(name)
        return files if files.key.exists() else self.authority.issue(identity_of(name), [], files.key.parent)

    def sign(self, name: str, by: str = "") -> None:
        log = self.log(name)
        add_head(log.directory / HEADS_FILE, sign_head(log.head, self.tls(by or name), now_s()))

    def see_tokens(self) -> None:
        """What a gateway does once a minute."""
        about = about_head(self.tokens.audit_head())
        self.log("gateway").append(
            Entry("spiffe://cortex/gateway/gateway", SEEN_HEAD, "allowed", "OK", about=about), now_s()
        )
        self.sign("gateway")


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(Layout.of(tmp_path / "net"))


@pytest.fixture
def verify(network, capsys):
    """Check every log of the network: the exit code, and what is said of each."""

    def verify(*more: str) -> tuple[int, dict]:
        code = main(["audit", "verify", "--dir", str(network.layout.root), "--json", *more])
        output = capsys.readouterr()
        return code, json.loads(output.out) if output.out else {"error": output.err}

    return verify


def test_the_logs_of_a_network_are_whole_each_by_its_service(network, verify):
    network.see_tokens()
    code, told = verify()
    assert code == 0
    assert set(told) == {*SERVICES, "tokens"}
    assert all(log["problems"] == log["unproven"] == [] for log in told.values()), told
    assert {name: told[name]["signed_by"] for name in SERVICES} == {name: identity_of(name).uri for name in SERVICES}
    assert told["tokens"]["signed_by"] == identity_of("gateway").uri


def test_a_log_of_the_network_named_by_its_folder_is_its_services_still(network, verify):
    folder = network.layout.state("coordinator") / "audit"
    shutil.rmtree(folder)
    network.log("coordinator")
    network.sign("coordinator", by="aggregator-eu")
    for more in ((), ("--log", str(folder))):
        code, told = verify(*more)
        assert code == 1
        assert "and this is the log of spiffe://cortex/coordinator/coordinator" in told["coordinator"]["problems"][0]


def test_a_log_that_is_gone_is_told_and_one_that_never_was_is_not(network, verify):
    for name in ("coordinator", "aggregator-eu"):
        shutil.rmtree(network.layout.state(name))
    shutil.rmtree(network.tokens.audit_directory)
    network.layout.logs.mkdir()
    network.layout.log("coordinator").touch()
    code, told = verify()
    assert code == 1
    assert "there is no audit log at" in told["coordinator"]["problems"][0]
    assert "there is no audit log at" in told["tokens"]["problems"][0]
    assert "aggregator-eu" not in told


def test_the_log_of_tokens_is_what_the_gateway_has_seen(network, verify):
    code, told = verify()
    assert (code, told["tokens"]["problems"]) == (0, []), "as an earlier version left it"
    assert told["tokens"]["unproven"] == [
        "no gateway has signed a head of it, as earlier versions did not: nothing proves it"
    ]
    network.see_tokens()
    network.tokens.create("ci", ["read"])
    code, told = verify()
    assert (code, told["tokens"]["unproven"]) == (0, ["record 2 is covered by no signed head yet"])
    network.see_tokens()
    assert verify()[1]["tokens"]["signed_up_to"] == 2
    log = network.tokens.audit_directory
    [segment] = log.glob("audit-*.jsonl")
    first, second = segment.read_bytes().splitlines(keepends=True)
    damages = {
        first: "record 2 was signed and is gone",
        second: "the records before 2 are gone",
        first.replace(b"name=me", b"name=he") + second: "record 1 was changed",
        b"": "there are no records",
    }
    for damaged, found in damages.items():
        segment.write_bytes(damaged)
        code, told = verify()
        assert code == 1
        assert found in "; ".join(told["tokens"]["problems"])
    segment.unlink()
    for record in (b"1", b"2"):
        AuditLog(log).append(Entry("uid:0", "token create", "allowed", "OK", about=record.decode()), OLD_S)
    assert "record 2 is not the one whose hash was signed" in verify()[1]["tokens"]["problems"]


def test_the_log_of_tokens_alone_proves_nothing(network, verify):
    tokens, gateway = str(network.tokens.audit_directory), str(network.layout.state("gateway") / "audit")
    network.see_tokens()
    code, told = verify("--log", tokens)
    assert code == 1
    assert "to be checked together with this one" in told["tokens"]["problems"][0]
    assert verify("--log", tokens, "--log", gateway)[0] == 0


def test_what_is_signed_after_a_revocation_is_not_believed(network, verify, capsys):
    state = network.layout.state("operator")
    state.mkdir()
    denial = {"identity": identity_of("coordinator").uri, "serials": [], "reason": "stolen", "at_s": now_s() + 60}
    (state / "denials.json").write_bytes(to_checked_json({"denials": [denial]}))
    assert verify()[0] == 0
    (state / "denials.json").write_bytes(to_checked_json({"denials": [{**denial, "at_s": now_s() - 60}]}))
    code, told = verify()
    assert code == 1
    assert "when its certificate was revoked" in told["coordinator"]["problems"][0]
    (state / "denials.json").write_text("{")
    code, told = verify()
    assert code == 1
    assert "which says who is shut out, cannot be read" in " ".join(told["error"].split())


def test_the_text_tells_each_log_in_a_line_and_what_is_not_proven_in_another(network, capsys):
    assert main(["audit", "verify", "--dir", str(network.layout.root)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "gateway: records 1 to 1, 1 signed head by spiffe://cortex/gateway/gateway: whole" in out
    assert out[-1].startswith("tokens: not proven: no gateway has signed a head of it")
    assert len(list(read_log(network.tokens.audit_directory))) == 1
