"""The commands of a person against a whole network of real processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import httpx
import numpy as np
import pytest

from cortex import Client
from cortex.local.status import running_report
from tests.architecture.sources import ROOT
from tests.e2e.conftest import Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

README = (ROOT / "README.md").read_text()


def pid_of(network: Shell, name: str) -> int | None:
    report = running_report(network.layout)
    assert report is not None
    return next((entry.process.pid for entry in report.processes if entry.name == name and entry.process), None)


def test_a_job_is_submitted_followed_and_its_model_is_what_the_status_says(network: Shell):
    done = network.run("submit", network.job(3), "--wait", "--json")
    status = json.loads(done.stdout)
    job_id = status["job_id"]

    assert done.returncode == 0, done.stderr
    assert (status["status"], status["round"], len(status["history"])) == ("completed", 3, 3)
    assert status["metrics"]["test_accuracy"] > 0.5
    assert [entry["accepted"] for entry in status["history"]] == [2, 2, 2]
    assert network.json("status", job_id) == status
    assert network.json("jobs")[0]["job_id"] == job_id

    model = network.json("model", "download", job_id, "-o", "model.safetensors")
    digest = hashlib.sha256((network.folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == model["sha256"] == status["model"]["sha256"]
    assert [version["round"] for version in network.json("model", "list", job_id)] == [1, 2, 3]

    events = [json.loads(line) for line in network.run("logs", job_id, "--json").stdout.splitlines()]
    assert events[0]["name"] == "job_submitted"
    assert events[-1]["name"] == "job_completed"
    assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)


def test_the_http_api_tells_the_same_story(network: Shell):
    job_id = network.json("submit", network.job(2), "--wait")["job_id"]
    ports = json.loads(network.layout.network_file.read_text())["members"]
    port = next(member["ports"]["http"] for member in ports if member["service"] == "gateway")
    token = network.layout.token_file.read_text().strip()
    for log in network.layout.logs.iterdir():
        assert token not in log.read_text(), f"the token is in {log.name}"

    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        assert http.get(f"/api/v1/jobs/{job_id}/status").status_code == 401
        http.headers["Authorization"] = f"Bearer {token}"
        status = http.get(f"/api/v1/jobs/{job_id}/status").json()
        regions = http.get("/api/v1/network/status").json()

    ours = network.json("status", job_id)
    times = ("submitted_at", "started_at", "finished_at")
    for document in (status, ours):
        document.update({key: datetime.fromisoformat(document[key]) for key in times})
    assert status == ours
    assert "eu" in json.dumps(regions)


def typing(network: Shell, text: str) -> subprocess.Popen[str]:
    """Somebody who types this, in a folder with the network and the examples."""
    (ports,) = [
        member["ports"]
        for member in json.loads(network.layout.network_file.read_text())["members"]
        if member["service"] == "gateway"
    ]
    # The README's ports are those of a machine with nothing else on it.
    text = text.replace("ws://127.0.0.1:8765", f"ws://127.0.0.1:{ports['websocket']}")
    redirect = f'connect-to = "127.0.0.1:8080:127.0.0.1:{ports["http"]}"'
    (network.folder / ".curlrc").write_text(f"{redirect}\nfail-with-body\n")
    if not (network.folder / "examples").exists():
        shutil.copytree(ROOT / "examples", network.folder / "examples")
        job = network.folder / "examples" / "digits.yaml"
        # As many as there are here, so that nobody is waited for.
        job.write_text(job.read_text().replace("workers: 4", "workers: 2"))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = network.environment | {"CURL_HOME": str(network.folder), "PATH": programs}
    command = ["bash", "-euo", "pipefail", "-c", text]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=network.folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def typed(network: Shell, text: str) -> str:
    """What is printed when somebody types this and waits for its end."""
    process = typing(network, text)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out


def block(start: str) -> tuple[str, str]:
    """The README's block that starts so: what comes before the first line that names a job, and the rest."""
    (text,) = [each for each in re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) if each.startswith(start)]
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if "JOB" in line), len(lines))
    return "\n".join(lines[:first]), "\n".join(lines[first:])


def check_model(network: Shell, job_id: str) -> None:
    """model.safetensors is the completed job's model; it is used up."""
    status = network.json("status", job_id)
    path = network.folder / "model.safetensors"
    assert (status["status"], hashlib.sha256(path.read_bytes()).hexdigest()) == ("completed", status["model"]["sha256"])
    path.unlink()


def test_the_readmes_curl_calls_do_what_they_say(network: Shell):
    submitting, following = block("API=")
    assert "JOB" in following
    job_id, second = re.findall(r'"job_id": ?"([^"]+)"', typed(network, submitting))
    access = "\n".join(submitting.splitlines()[:2])
    told = typed(network, access + "\n" + following.replace("JOB", job_id))
    assert '"completed"' in told
    assert '"regions"' in told
    check_model(network, job_id)
    until(lambda: network.json("status", second)["status"] == "completed", 100)


def test_the_readmes_commands_do_what_they_say(network: Shell):
    submitting, following = block("cortex submit")
    assert "completed" in typed(network, submitting)
    job_id = network.json("jobs")[0]["job_id"]
    assert "job_completed" in typed(network, following.replace("JOB", job_id))
    check_model(network, job_id)


def test_the_readmes_worker_behind_a_gateway_joins_and_leaves(network: Shell):
    (commands, _) = block("cortex node token --gateway")
    token, worker = commands.split("\n", 1)
    typed(network, token)
    process = typing(network, f"exec env {worker}")
    try:
        until(lambda: health_of(network, "lab-3") == ("eu", "live"), 100)
    finally:
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    until(lambda: health_of(network, "lab-3") != ("eu", "live"))


def health_of(network: Shell, name: str) -> tuple[str, str] | None:
    """Region and health of a node that is listed."""
    return next(((node["region"], node["health"]) for node in network.json("nodes") if node["name"] == name), None)


def test_the_readmes_python_client_does_what_it_says(network: Shell):
    (program, _) = block("from pathlib import Path")
    (network.folder / "client.py").write_text(program)
    told = typed(network, "python client.py").splitlines()
    assert told[-1].startswith("completed ")
    check_model(network, network.json("jobs")[0]["job_id"])


def test_the_audit_logs_are_whole_and_each_is_signed_by_its_service(network: Shell):
    """The gateway signs for the log of tokens as soon as it runs."""
    until(lambda: network.json("audit", "verify")["tokens"]["signed_up_to"] >= 1, 60)
    told = network.json("audit", "verify")
    members = json.loads(network.layout.network_file.read_text())["members"]
    services = {member["name"]: member["service"] for member in members if member["service"] != "worker"}
    assert set(told) == {*services, "tokens"}
    assert not any(log["problems"] for log in told.values()), told
    for name, service in services.items():
        assert told[name]["signed_by"] == f"spiffe://cortex/{service}/{name}"
        assert told[name]["signed_heads"] >= 1, "at the start, whether there are records or not"


def test_nodes_and_resources_know_every_worker_and_its_region(network: Shell):
    workers = network.json("nodes", "--role", "worker")

    assert {(node["name"], node["region"], node["health"]) for node in workers} == {
        ("eu-1", "eu", "live"),
        ("us-1", "us", "live"),
    }
    assert network.json("resources")["total"]["workers"] == 2


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("input_dim: 64", "input_dim: 63", "model.input_dim"),
        ("train: digits", "train: didgits", "didgits"),
        ("rounds", "rouns", "training.rouns"),
    ],
)
def test_a_bad_job_is_refused_with_what_is_wrong(network: Shell, old: str, new: str, told: str):
    before = len(network.json("jobs"))

    done = network.run("submit", network.job(1, {old: new}), "--wait")

    assert done.returncode == 1
    assert done.stdout == ""
    assert told in done.stderr
    assert len(network.json("jobs")) == before


def test_a_job_that_waits_for_workers_says_so_and_can_be_cancelled(network: Shell):
    many = {"workers: 2, min_workers: 2": "workers: 9, min_workers: 9"}
    done = network.run("submit", network.job(1, many), "--json")
    assert done.returncode == 0, done.stderr
    job_id = json.loads(done.stdout)["job_id"]

    until(lambda: "2 of 9" in (network.json("status", job_id)["waiting_for"] or ""))
    assert network.json("cancel", job_id)["status"] == "cancelled"
    watched = network.run("status", job_id, "--watch")
    assert watched.returncode == 1
    assert "cancelled" in watched.stderr


def test_ctrl_c_ends_the_watching_not_the_job(network: Shell):
    process = network.start("submit", network.job(400), "--wait")
    assert process.stderr is not None
    job_id = process.stderr.readline().split()[-1]
    until(lambda: network.json("status", job_id)["round"] >= 1)

    process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"cortex status {job_id} --watch" in err
    assert network.json("status", job_id)["status"] not in ("failed", "cancelled")
    assert network.json("pause", job_id)["job_id"] == job_id
    until(lambda: network.json("status", job_id)["status"] == "paused")
    network.json("resume", job_id)
    network.json("cancel", job_id)


def test_killing_every_service_in_turn_loses_nothing(network: Shell):
    rounds = 20
    undisturbed = network.json("submit", network.job(rounds), "--wait")
    watcher = network.start("submit", network.job(rounds), "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]

    with Client(directory=network.layout.root) as client:
        for done, name in enumerate(("discovery", "gateway", "aggregator-us", "eu-1", "aggregator-eu", "coordinator")):
            until(lambda done=done: client.status(job_id).round > 2 * done, timeout_s=60)
            assert not client.status(job_id).status.is_terminal
            victim = pid_of(network, name)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            until(lambda name=name, victim=victim: pid_of(network, name) not in (None, victim))

    out, err = watcher.communicate(timeout=150)
    assert watcher.returncode == 0, err
    status = json.loads(out.splitlines()[-1])
    assert [entry["round"] for entry in status["history"]] == list(range(1, rounds + 1))
    assert all(entry["accepted"] == 2 for entry in status["history"])
    assert status["model"]["sha256"] == undisturbed["model"]["sha256"]


def test_workers_train_on_their_own_data(tmp_path):
    shell = Shell(tmp_path)
    random = np.random.default_rng(0)
    for name in ("eu-1", "us-1"):
        inputs = random.normal(size=(60, 12)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", x=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
        (tmp_path / f"{name}.yaml").write_text(f"datasets:\n  wards: {{npz: {name}.npz}}\n")
    done = shell.run("up", "--detach", "--workers", "2", "--catalogue", "{name}.yaml")
    try:
        assert done.returncode == 0, done.stderr
        replaced = {
            "train: digits, test: digits-test": "train: wards, partition: {scheme: local}",
            "input_dim: 64": "input_dim: 12",
            "output_dim: 10": "output_dim: 2",
        }
        status = shell.json("submit", shell.job(2, replaced), "--wait")
        assert status["status"] == "completed"
        assert status["history"][-1]["participants"] == 2
    finally:
        stopped = shell.run("down")
    assert stopped.returncode == 0
    assert running_report(shell.layout) is None
