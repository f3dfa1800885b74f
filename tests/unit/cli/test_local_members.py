from __future__ import annotations

import socket
import sys

import pytest

from cortex.local.members import SEARCH, assign_ports, members_of
from cortex.local.ports import PortClaims, is_free
from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Role


def test_workers_are_dealt_to_the_regions_in_turn():
    members = members_of(("eu", "us"), 5)

    assert [(m.name, m.region) for m in members if m.service is Role.WORKER] == [
        ("eu-1", "eu"),
        ("us-1", "us"),
        ("eu-2", "eu"),
        ("us-2", "us"),
        ("eu-3", "eu"),
    ]


def test_every_region_has_an_aggregator():
    members = members_of(("eu", "us", "asia"), 1)

    assert [m.name for m in members if m.service is Role.AGGREGATOR] == [
        "aggregator-eu",
        "aggregator-us",
        "aggregator-asia",
    ]


@pytest.mark.parametrize(("regions", "workers"), [((), 1), (("eu", "eu"), 1), (("eu", ""), 1), (("eu",), 0)])
def test_impossible_networks_are_refused(regions: tuple[str, ...], workers: int):
    with pytest.raises(InvalidArgumentError, match="allowed"):
        members_of(regions, workers)


def test_free_default_ports_are_used_without_a_word():
    members, notices = assign_ports(members_of(("eu", "us"), 1), {}, lambda _: True)

    ports = {member.name: member.ports for member in members}
    assert ports["coordinator"] == {"grpc": 50051, "metrics": 9191}
    assert ports["discovery"]["grpc"] == 50052
    assert [ports[f"aggregator-{region}"]["grpc"] for region in ("eu", "us")] == [50054, 50055]
    assert ports["gateway"]["http"] == 8080
    assert notices == ()


def test_a_taken_default_port_is_replaced_and_told():
    members, notices = assign_ports(members_of(("eu",), 1), {}, lambda port: port not in {8080, 8081})

    assert next(m for m in members if m.service is Role.GATEWAY).ports["http"] == 8082
    assert notices == ("some ports are taken; used instead: gateway http 8082 (not 8080)",)


def test_ports_of_an_earlier_start_are_kept_unless_taken_since():
    before = {"coordinator": {"grpc": 51000, "metrics": 9300}, "discovery": {"grpc": 51001, "metrics": 9301}}

    members, notices = assign_ports(members_of(("eu",), 1), before, lambda port: port != 51001)

    ports = {member.name: member.ports for member in members}
    assert ports["coordinator"] == before["coordinator"]
    assert ports["discovery"] == {"grpc": 51002, "enrolment": 50053, "metrics": 9301}
    assert notices == ("some ports are taken; used instead: discovery grpc 51002 (not 51001)",)


def test_no_two_listeners_share_a_port():
    members, _ = assign_ports(members_of(("eu", "us"), 40), {}, lambda port: port % 3 == 0)

    ports = [port for member in members for port in member.ports.values()]
    assert len(set(ports)) == len(ports)


def test_running_out_of_ports_says_where_was_looked():
    with pytest.raises(InvalidArgumentError, match=rf"from 50052 to {50052 + SEARCH - 1}"):
        assign_ports(members_of(("eu",), 1), {}, lambda _: False)


def test_a_port_somebody_listens_on_is_not_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)


def test_a_port_kept_for_a_network_is_not_given_to_another_even_while_nobody_listens_on_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with PortClaims(tmp_path) as first, PortClaims(tmp_path) as second:
        assert first.claim(port)
        assert first.claim(port)
        assert not second.claim(port)
    with PortClaims(tmp_path) as third:
        assert third.claim(port)


def test_a_server_can_listen_on_a_port_that_is_kept_for_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with PortClaims(tmp_path) as claims:
        assert claims.claim(port)
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)):
                server.accept()[0].close()


@pytest.mark.skipif(sys.platform != "linux", reason="ports are kept bound on Linux only")
def test_no_outgoing_connection_is_given_a_port_that_is_kept(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with PortClaims(tmp_path) as claims, socket.socket() as taker:
        assert claims.claim(port)
        with pytest.raises(OSError, match="in use"):
            taker.bind(("127.0.0.1", port))
