"""What is written for each service is what its settings class reads."""

from __future__ import annotations

import importlib
import json
import stat
from pathlib import Path

import pytest

from cortex.local.layout import Layout
from cortex.local.members import Member
from cortex.local.network import LocalNetwork, read_network
from cortex.local.prepare import Prepared, prepare, wipe
from cortex.local.token import ensure_token
from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Identity, Role
from cortex_common.job.parse import load_job_file
from cortex_common.security.authority import Authority
from cortex_common.security.joining import JoinToken
from cortex_common.security.tokens import TokenStore
from cortex_common.settings import ServiceSettings, load_settings

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.of(tmp_path / "net")


@pytest.fixture
def prepared(layout: Layout) -> Prepared:
    return prepare(layout, LocalNetwork(workers=2), lambda _: True)


def settings_class(service: str) -> type[ServiceSettings]:
    return getattr(importlib.import_module(f"services.{service}.settings"), f"{service.capitalize()}Settings")


def settings_of(layout: Layout, member: Member) -> ServiceSettings:
    return load_settings(settings_class(member.service), layout.config(member.name), member.service, environment={})


def test_every_service_can_read_its_configuration(layout, prepared):
    for member in prepared.network.members:
        settings = settings_of(layout, member)
        assert (settings.name, settings.region) == (member.name, member.region)
        assert settings.metrics_port == member.ports["metrics"]
        assert settings.port == member.ports.get("grpc", member.ports.get("http", 0))


def test_every_member_has_a_join_token_of_its_own_that_names_its_role(layout, prepared):
    known = json.loads(layout.join_tokens_file.read_text())["tickets"]
    for member in prepared.network.members:
        settings = settings_of(layout, member)
        if member.service is Role.DISCOVERY:
            assert settings.joining is None
            assert settings.authority == layout.authority
            continue
        token = settings.joining
        assert token.identity == Identity("cortex", member.service, member.name)
        assert token.fingerprint == Authority.load(layout.authority).fingerprint
        assert token.hash in {ticket["hash"] for ticket in known}
        assert stat.S_IMODE(layout.join_token(member.name).stat().st_mode) == 0o600
    assert JoinToken.decode(layout.join_token("operator").read_text()).identity.role is Role.OPERATOR


def test_who_has_a_certificate_of_the_authority_needs_no_token(layout, prepared):
    authority = Authority.load(layout.authority)
    identity = Identity("cortex", Role.WORKER, "eu-1")
    authority.issue(identity, [], layout.certificates / "eu-1")
    (layout.certificates / "eu-1" / "enrolment.json").write_text("{}")

    again = prepare(layout, read_network(layout), lambda _: True).network

    assert not layout.join_token("eu-1").exists()
    assert settings_of(layout, next(each for each in again.members if each.name == "eu-1")).joining is None
    assert layout.join_token("us-1").exists()


def test_preparing_again_keeps_authority_ports_and_token(layout, prepared):
    before = (layout.authority / "ca.pem").read_bytes(), read_network(layout), ensure_token(layout)

    prepare(layout, read_network(layout), lambda _: True)

    assert ((layout.authority / "ca.pem").read_bytes(), read_network(layout), ensure_token(layout)) == before


def test_the_token_file_holds_a_token_the_gateway_accepts_and_only_its_owner_can_read_it(layout, prepared):
    token = ensure_token(layout)

    assert TokenStore(layout.tokens_file).verify(token).name == "local-operator"
    assert stat.S_IMODE(layout.token_file.stat().st_mode) == 0o600
    TokenStore(layout.tokens_file).revoke(token.split("_")[1])
    assert ensure_token(layout) != token


def test_wiping_removes_the_network_and_nothing_else(layout, prepared):
    ensure_token(layout)
    (layout.root / "thesis.txt").write_text("mine")

    wipe(layout)

    assert {path.name for path in layout.root.iterdir()} <= {"thesis.txt", ".gitignore", "lock"}


def test_a_missing_catalogue_is_told_before_anything_is_written(layout, tmp_path):
    network = LocalNetwork(workers=1, catalogue=str(tmp_path / "{name}.yaml"))

    with pytest.raises(InvalidArgumentError, match=r"eu-1\.yaml"):
        prepare(layout, network, lambda _: True)
    assert not layout.root.exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_job(path):
    assert load_job_file(path).name
