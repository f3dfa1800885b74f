"""What Grafana shows: every query of every panel is asked of a real Prometheus that watched a real run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import httpx
import pytest

from cortex.local.network import LocalNetwork, read_network
from cortex_common.identity import Role
from cortex_common.pb.v1 import coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.channel import open_sync_channel
from tests.e2e.conftest import Shell
from tests.integration.stores.servers import free_port
from tests.monitoring import PROMETHEUS, Prometheus, Query, prometheus, queries, variables
from tests.waiting import until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        PROMETHEUS is None,
        reason="NO PROMETHEUS ON THIS MACHINE: no panel was checked (Debian: apt install prometheus)",
    ),
]


@dataclass(frozen=True)
class Watched:
    """A run that Prometheus scraped from its beginning to its end."""

    server: Prometheus
    from_s: float
    to_s: float


@pytest.fixture(scope="module")
def watched(network: Shell, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A job with a test set and one that is cancelled, and callers who are refused."""
    known = read_network(network.layout)
    with prometheus(tmp_path_factory.mktemp("prometheus"), known.members, free_port()) as server:
        until(lambda: all_up(server, len(known.members)), timeout_s=30)
        from_s = time.time()
        for _ in range(2):  # a counter that a scrape finds for the first time has no rate yet, and its ratios are 0/0
            refused_callers(network, known)
            done = network.run("submit", network.job(6), "--wait")
            assert done.returncode == 0, done.stderr
            scraped_again(server)
        yield Watched(server, from_s, time.time())


def all_up(server: Prometheus, count: int) -> bool:
    return len(server.ask("query", query="up == 1")["result"]) == count


def scraped_again(server: Prometheus) -> None:
    """Wait until three more scrapes, of everything, are in."""
    seen = time.time()
    oldest = "min(timestamp(up))"
    until(lambda: float(server.ask("query", query=oldest)["result"][0]["value"][1]) > seen + 3)


def refused_callers(network: Shell, known: LocalNetwork) -> None:
    """A token that nobody gave out, and a worker that would submit jobs."""
    gateway = known.of_role(Role.GATEWAY)[0].address("http")
    answer = httpx.get(f"http://{gateway}/api/v1/jobs", headers={"Authorization": "Bearer ctx_nobody_knows"})
    assert answer.status_code == 401
    tls = network.layout.tls(known.of_role(Role.WORKER)[0].name)
    with open_sync_channel(known.address(Role.COORDINATOR), tls, Role.COORDINATOR) as channel:
        stub = coordinator_pb2_grpc.JobServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="may not call"):
            stub.ListJobs(coordinator_pb2.ListJobsRequest())


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.label)
def test_every_query_of_every_panel_returns_data(watched: Watched, query: Query) -> None:
    assert watched.server.answers(query, watched.from_s, watched.to_s), query.expression


@pytest.mark.parametrize("variable", variables())
def test_every_variable_has_values_to_choose_from(watched: Watched, variable: str) -> None:
    metric, label = variable.removeprefix("label_values(").removesuffix(")").split(", ")
    assert watched.server.ask(f"label/{label}/values", **{"match[]": metric})


def test_rules_are_evaluated_without_error_and_alerts_are_quiet(watched: Watched) -> None:
    groups = watched.server.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]
