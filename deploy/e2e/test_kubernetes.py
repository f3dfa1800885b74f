"""The manifests on a real cluster: the one KUBECONFIG names, whose node has the images (`make images`)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import elsewhere
import pytest
from api import Api, job, until
from invariants import Disturbances, counted_once

K8S = Path(__file__).parents[1] / "k8s"
WORKLOADS = (
    "deployment/discovery",
    "deployment/gateway",
    "statefulset/aggregator",
    "deployment/coordinator",
    "statefulset/worker",
    "statefulset/postgres",
)


def kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], check=False, text=True, input=text, capture_output=True)
    assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the operator's files are, and what the Secrets were made of."""
    return Path(os.environ.get("CORTEX_K8S_SECRETS") or tmp_path_factory.mktemp("secrets"))


@pytest.fixture(scope="module")
def applied(secrets: Path) -> Iterator[Api]:
    """The whole system, in the namespace `cortex`, removed afterwards."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("NO CLUSTER: KUBECONFIG names none, so the manifests were not applied")
    server = json.loads(kubectl("version", "--output=json"))["serverVersion"]
    overlay = "dev" if int(server["minor"].rstrip("+")) >= 25 else "e2e"
    manifests = kubectl("kustomize", str(K8S / "overlays" / overlay))
    kubectl("apply", "--filename", str(K8S / "base" / "namespace.yaml"), "--namespace", "cortex")
    made = subprocess.run(
        [sys.executable, str(K8S / "make_secrets.py"), "--folder", str(secrets)],
        check=True, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    kubectl("apply", "--filename", "-", text=made.stdout)
    kubectl("apply", "--filename", "-", text=manifests)
    try:
        for workload in WORKLOADS:
            rolled_out(workload)
        with forwarded("service/gateway", 8080) as port:
            yield Api(f"http://127.0.0.1:{port}", (secrets / "operator" / "token").read_text().strip())
    finally:
        if "KEEP" not in os.environ:
            kubectl("delete", "namespace", "cortex", "--timeout=120s")


def rolled_out(workload: str) -> None:
    kubectl("--namespace", "cortex", "rollout", "status", workload, "--timeout=300s")


@contextmanager
def forwarded(target: str, port: int) -> Iterator[int]:
    """A local port that leads there, again and again: a forward ends with the pod it leads to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        local = free.getsockname()[1]
    bash = shutil.which("bash")
    assert bash is not None
    again = (
        f"while :; do kubectl --namespace cortex port-forward {target} {local}:{port} >/dev/null 2>&1; sleep 0.5; done"
    )
    process = subprocess.Popen([bash, "-c", again], start_new_session=True)
    try:
        until("a forwarded port", lambda: is_listening(local))
        yield local
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def restarted(workload: str) -> None:
    kubectl("--namespace", "cortex", "rollout", "restart", workload)
    rolled_out(workload)


def uids() -> dict[str, str]:
    pods: list[dict[str, Any]] = json.loads(kubectl("--namespace", "cortex", "get", "pods", "--output=json"))["items"]
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods}


def test_a_rolling_update_of_every_service_during_a_job_loses_nothing(applied: Api) -> None:
    drill = Disturbances(lambda: applied, topology="flat")
    before = uids()
    with drill.disturbed() as job_id:
        for workload in WORKLOADS:
            print(f"round {applied.gets_further(job_id)}: {workload}")
            restarted(workload)
        applied.gets_further(job_id)
        assert not set(before.values()) & set(uids().values())
    drill.undisturbed()
    done = applied.completed(applied.submit(job(10, topology="flat")))
    assert done["metrics"]["test_accuracy"] > 0.9


def test_pods_run_with_the_security_settings_of_the_manifests(applied: Api) -> None:
    pods = json.loads(kubectl("--namespace", "cortex", "get", "pods", "--output=json"))["items"]
    assert len(pods) == 9
    for pod in pods:
        security = pod["spec"]["containers"][0]["securityContext"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_a_worker_elsewhere_needs_the_websocket_port_only(applied: Api, secrets: Path, tmp_path: Path) -> None:
    with forwarded("service/coordinator", 50051) as coordinator, forwarded("service/discovery", 50052) as discovery:
        services = {"ENDPOINT": f"127.0.0.1:{coordinator}", "DISCOVERY": f"127.0.0.1:{discovery}"}
        named = ("--gateway", "--name", "elsewhere", "--region", "us")
        given = elsewhere.cortex(secrets / "operator", "node", "token", *named, **services)
    with forwarded("service/gateway", 8765) as port:
        url = f"ws://127.0.0.1:{port}"
        with elsewhere.worker(tmp_path, "elsewhere", "us", token=given.strip(), url=url):
            until("the worker elsewhere is there", lambda: "elsewhere" in applied.live("worker"))
            document = job(10, topology="flat")
            document["placement"] = {"workers": 5, "min_workers": 5}
            counted_once(applied.completed(applied.submit(document)), workers=5)
