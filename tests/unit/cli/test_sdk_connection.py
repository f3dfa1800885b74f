from __future__ import annotations

from pathlib import Path

import pytest

from cortex.connection import CONFIG_FILE, find_connection
from cortex.local.layout import Layout
from cortex.local.members import assign_ports, members_of
from cortex.local.network import LocalNetwork, OperatorFiles, write_network
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError


def network_in(directory: Path, coordinator_port: int) -> Path:
    ports = {"coordinator": {"grpc": coordinator_port}}
    members, _ = assign_ports(members_of(("eu",), 1), ports, lambda _: True)
    operator = OperatorFiles(ca=Path("ca.pem"), certificate=Path("tls.crt"), key=Path("tls.key"))
    write_network(Layout.of(directory), LocalNetwork(members=members, operator=operator))
    return directory


@pytest.fixture
def places(tmp_path):
    """Every place a network may be named in, each naming another one."""
    home, working = tmp_path / "home", tmp_path / "work"
    for name in ("ca", "certificate", "key"):
        (tmp_path / name).touch()
    files = {name: str(tmp_path / name) for name in ("ca", "certificate", "key")}
    network_in(working / ".cortex", 1004)
    config = home / CONFIG_FILE
    config.parent.mkdir(parents=True)
    config.write_text('endpoint = "config:1005"\n' + "".join(f'{key} = "{value}"\n' for key, value in files.items()))
    environment = {
        "CORTEX_DIR": str(network_in(tmp_path / "variable", 1002)),
        "CORTEX_ENDPOINT": "endpoint:1003",
        **{f"CORTEX_{name.upper()}": path for name, path in files.items()},
    }
    return {
        "directory": network_in(tmp_path / "option", 1001),
        "environment": environment,
        "working": working,
        "home": home,
    }


def test_the_network_is_looked_for_in_the_documented_order(places):
    found = []
    found.append(find_connection(**places).coordinator)
    places["directory"] = None
    found.append(find_connection(**places).coordinator)
    del places["environment"]["CORTEX_DIR"]
    found.append(find_connection(**places).coordinator)
    del places["environment"]["CORTEX_ENDPOINT"]
    found.append(find_connection(**places).coordinator)
    (places["working"] / ".cortex" / "network.json").unlink()
    found.append(find_connection(**places).coordinator)

    assert found == ["127.0.0.1:1001", "127.0.0.1:1002", "endpoint:1003", "127.0.0.1:1004", "config:1005"]


def test_with_nothing_found_the_error_says_how_to_start_a_network(tmp_path):
    with pytest.raises(NotFoundError, match="cortex up"):
        find_connection(environment={}, working=tmp_path, home=tmp_path)


def test_a_directory_without_a_network_is_an_error_even_if_another_network_could_be_found(places, tmp_path):
    with pytest.raises(NotFoundError, match=r"no Cortex network in .*empty.*cortex up --dir"):
        find_connection(**places | {"directory": tmp_path / "empty"})


def test_an_endpoint_without_certificates_names_every_missing_variable(places):
    environment = {"CORTEX_ENDPOINT": "nonsense", "CORTEX_CA": "/nowhere/ca.pem"}

    with pytest.raises(InvalidArgumentError) as caught:
        find_connection(None, environment, places["working"], places["home"])

    assert [v.path for v in caught.value.violations] == [
        "CORTEX_CERTIFICATE",
        "CORTEX_KEY",
        "CORTEX_CA",
        "CORTEX_ENDPOINT",
    ]


def test_discovery_is_at_the_endpoints_host_unless_named(places):
    environment = places["environment"]
    del environment["CORTEX_DIR"]

    assert find_connection(None, environment, places["working"], places["home"]).discovery == "endpoint:50052"
    environment["CORTEX_DISCOVERY"] = "other:1"
    assert find_connection(None, environment, places["working"], places["home"]).discovery == "other:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [("endpoint = ", "not TOML"), ('endpoit = "a:1"', "unknown key"), ("endpoint = 5", "allowed: a string")],
)
def test_mistakes_in_the_config_file_are_told(tmp_path, text, message):
    (tmp_path / CONFIG_FILE).parent.mkdir(parents=True)
    (tmp_path / CONFIG_FILE).write_text(text)

    with pytest.raises(InvalidArgumentError, match=message):
        find_connection(None, {}, tmp_path / "elsewhere", tmp_path)


def test_a_damaged_network_file_says_what_to_do(tmp_path):
    (tmp_path / "network.json").write_text('{"members": 3}')

    with pytest.raises(CorruptError, match="remove it and run `cortex up"):
        find_connection(tmp_path)
