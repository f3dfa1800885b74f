"""A worker or an aggregator is shut out in the middle of a job: within seconds, and the job goes on without it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cortex import Client
from cortex.local.detached import stop_network
from cortex.local.network import read_network
from cortex_common.errors import UnauthenticatedError
from cortex_common.identity import Role
from cortex_common.rpc.channel import open_sync_channel
from cortex_common.rpc.errors import calling
from tests.e2e.conftest import WIDE, Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

WITHIN_S = 10.0
ROUNDS = 12
# Nobody loses a seat for being silent as long as this test halts a worker.
LEASE_S = 120.0


@pytest.fixture
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Three workers, one more than the job takes."""
    shell = Shell(tmp_path_factory.mktemp("network"))
    done = shell.run("up", "--detach", "--workers", "3")
    try:
        assert done.returncode == 0, done.stderr
        yield shell
    finally:
        stop_network(shell.layout)


class Caller:
    """Calls with a worker's certificate: a stream and short calls at one server."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._health = health_pb2_grpc.HealthStub(channel)
        self._stream = self._health.Watch(health_pb2.HealthCheckRequest())
        assert next(self._stream).status == health_pb2.HealthCheckResponse.SERVING
        self.cut_s = float("inf")
        self.reason = ""
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        try:
            with calling("the server"):
                list(self._stream)
        except UnauthenticatedError as error:
            self.cut_s, self.reason = time.monotonic(), error.message

    def wait(self) -> None:
        self._reading.join(2 * WITHIN_S)

    def call(self) -> None:
        with calling("the server"):
            self._health.Check(health_pb2.HealthCheckRequest(), timeout=10)


def counted(network: Shell, job_id: str) -> dict[str, list[int]]:
    """Rounds in whose version each worker's update is."""
    found: dict[str, list[int]] = {}
    database = network.layout.state("coordinator") / "coordinator.db"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT worker, round FROM contribution WHERE job_id = ? ORDER BY round", (job_id,))
        for worker, number in rows:
            if number:
                found.setdefault(worker, []).append(number)
    return found


def test_a_revoked_worker_is_out_within_seconds_and_the_job_goes_on_with_another(network: Shell):
    network.reconfigure({"discovery": {"lease_s": LEASE_S}})
    network.slow_down({"lease_s": LEASE_S})
    members = read_network(network.layout)
    watcher = network.start("submit", network.job(ROUNDS, WIDE), "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]
    with Client(directory=network.layout.root) as client, ExitStack() as channels:
        until(lambda: client.status(job_id).round >= 3)
        lost = min(counted(network, job_id))
        tls = network.layout.tls(lost)
        callers = {
            member.name: Caller(channels.enter_context(open_sync_channel(member.address() or "", tls, member.service)))
            for member in members.members
            if member.service in (Role.COORDINATOR, Role.AGGREGATOR, Role.DISCOVERY)
        }
        assert len(callers) == 4
        for caller in callers.values():
            caller.call()

        until(lambda: "uploading" in doing(client, job_id)[lost])
        # A round that waits for this worker, and for nobody else, stays open until its seat is another's.
        channels.enter_context(halted(network.processes()[lost]))
        until(lambda: is_held_by(lost, doing(client, job_id)))
        before, started_s = client.status(job_id).round, time.monotonic()
        revoked = network.json("node", "revoke", lost, "--reason", "laptop lost")
        assert revoked == {"revoked": [f"spiffe://cortex/worker/{lost}"]}
        for name, caller in callers.items():
            caller.wait()
            assert caller.cut_s - started_s < WITHIN_S, name
            assert "laptop lost" in caller.reason
            with pytest.raises(UnauthenticatedError, match="was revoked"):
                caller.call()
        after = client.status(job_id).round
        assert after < ROUNDS

        out, err = watcher.communicate(timeout=100)
        assert watcher.returncode == 0, err
        status = json.loads(out.splitlines()[-1])
        assert [entry["round"] for entry in status["history"]] == list(range(1, ROUNDS + 1))
        assert all(entry["accepted"] == 2 for entry in status["history"])
        rounds = counted(network, job_id)
        assert rounds[lost][: before - 1] == list(range(1, before))
        assert max(rounds[lost]) <= after
        assert len(rounds) == 3
        assert {name for name, each in rounds.items() if ROUNDS in each} == set(rounds) - {lost}
        [given_on] = [event for event in client.events(job_id) if event.name == "seat_given_on"]
        assert before <= given_on.round <= after
        # The key that the worker had was closed with the round it was shut out of.
        [left] = [epoch for epoch in client.keys(job_id) if epoch.reason == f"worker {lost} left"]
        assert before < left.from_round <= after + 1
        # With the lease given above only the revocation can be the cause. Discovery tells of it in two ways, that the
        # worker is shut out and that it is gone, and the event names the one that came first.
        assert f"takes over from {lost} (" in given_on.message
        assert time.monotonic() - started_s < LEASE_S
        assert lost not in {node.name for node in client.nodes() if node.health == "live"}


def test_nothing_calls_a_revoked_aggregator_any_more_and_its_region_has_another(network: Shell):
    network.slow_down()
    # Enough of them to be still under way when the command has been started and has done its work.
    rounds = 3 * ROUNDS
    regional = {**WIDE, "workers: 2, min_workers: 2}": "workers: 3}\naggregation: {topology: regional}"}
    watcher = network.start("submit", network.job(rounds, regional), "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]
    with Client(directory=network.layout.root) as client:
        until(lambda: client.status(job_id).round >= 3, 60)
        root = next(event for event in client.events(job_id) if event.name == "round_opened").message.split()[-1]
        [lost] = {member.name for member in read_network(network.layout).of_role(Role.AGGREGATOR)} - {root}
        # The coordinator follows the round there, and a worker sends its update.
        until(lambda: counted_calls(network, lost, "cortex_rpc_open_requests") >= 2, 60)
        network.json("node", "revoke", lost, "--reason", "stolen")
        until(lambda: counted_calls(network, lost, "cortex_rpc_open_requests") == 0, WITHIN_S)
        before = counted_calls(network, lost, "cortex_rpc_requests_total")
        assert client.status(job_id).round < rounds

        out, err = watcher.communicate(timeout=200)
        assert watcher.returncode == 0, err
        status = json.loads(out.splitlines()[-1])
        assert [entry["round"] for entry in status["history"]] == list(range(1, rounds + 1))
        assert all(entry["accepted"] == 3 for entry in status["history"])
        assert counted_calls(network, lost, "cortex_rpc_requests_total") == before
        # Discovery tells of it in two ways, that it is shut out and that it is gone; the first to come names the event.
        moved = next(event for event in client.events(job_id) if event.name in ("aggregator_revoked", "region_moved"))
        # Nobody asked for its sealing key again: the next data key was not wrapped to it.
        reasons = (f"aggregator {lost} was revoked", f"aggregator {lost} left")
        [closed] = [epoch for epoch in client.keys(job_id) if epoch.reason in reasons]
        assert moved.round <= closed.from_round <= moved.round + 1


def counted_calls(network: Shell, name: str, metric: str) -> float:
    """What a member counts of the calls it answers, all methods together."""
    port = next(member for member in read_network(network.layout).members if member.name == name).ports["metrics"]
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{metric}{{"))


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """A process that does nothing inside the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def doing(client: Client, job_id: str) -> dict[str, str]:
    """What each worker is doing for a job now, in words."""
    return {each.worker: each.activity for each in client.status(job_id).workers}


def is_held_by(worker: str, activities: dict[str, str]) -> bool:
    """Whether a round is all there but for one worker's update."""
    return activities.pop(worker) != "done" and set(activities.values()) == {"done"}
