"""A job with planted weights, data, keys and tokens: nothing that any service writes or sends shows them."""

from __future__ import annotations

import base64
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from websockets.client import ClientProtocol
from websockets.protocol import State
from websockets.uri import parse_uri

from cortex.local.detached import stop_network
from cortex.local.network import LocalNetwork, read_network
from cortex_common.clock import SystemClock
from cortex_common.identity import Role
from cortex_common.security.joining import JoinToken
from cortex_common.security.keyring import FileKeyring, RestingKey
from cortex_common.security.node_tokens import NodeToken
from tests.e2e.canaries import Frames, Recorder, appearances, files_below, found_in
from tests.e2e.conftest import Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

INPUTS, HIDDEN = 16, 32
JOB = """
name: canaries
model: {{kind: mlp, input_dim: 16, hidden_dims: [32], output_dim: 2, init_from: {weights}, freeze: ["hidden_1.*"]}}
data: {{train: wards, test: wards, partition: {{scheme: local}}}}
training: {{learning_rate: 0.01, rounds: 3, local_epochs: 1}}
placement: {{workers: 3, min_workers: 3}}
aggregation: {{topology: regional}}
"""


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A network of two workers, each with data of its own, and data for a third one elsewhere."""
    made = Shell(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    random = np.random.default_rng(5)
    for name in ("eu-1", "us-1", "ward-3"):
        inputs = random.normal(size=(40, INPUTS)).astype(np.float32)
        np.savez(own / f"{name}.npz", x=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
        (own / f"{name}.yaml").write_text(f"datasets:\n  wards: {{npz: {name}.npz}}\n")
    shapes = {"hidden_1.weight": (HIDDEN, INPUTS), "hidden_1.bias": (HIDDEN,), "output.weight": (2, HIDDEN)}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors | {"output.bias": np.zeros(2, np.float32)}, own / "weights.safetensors")
    done = made.run("up", "--detach", "--workers", "2", "--catalogue", str(own / "{name}.yaml"))
    try:
        assert done.returncode == 0, done.stderr
        yield made
    finally:
        stop_network(made.layout)


def put_between(network: Shell, members: LocalNetwork, recorder: Recorder) -> dict[Role, str]:
    """Have everybody reach everybody else through proxies; where they stand for whom."""
    proxies = {role: recorder.before(members.address(role)) for role in (Role.DISCOVERY, Role.COORDINATOR)}
    changes: dict[str, dict[str, str]] = {}
    for member in members.members:
        settings = yaml.safe_load(network.layout.config(member.name).read_text())
        changed = {role.value: proxy for role, proxy in proxies.items() if role.value in settings}
        if member.service is Role.AGGREGATOR:
            changed["advertise"] = recorder.before(member.address() or "")
        if changed:
            changes[member.name] = changed
    network.reconfigure(changes)
    return proxies


def private_keys(folder: Path) -> dict[str, bytes]:
    """The secret number of each key file below a folder, by path."""
    keys = {}
    for path in folder.rglob("*.key"):
        key = load_pem_private_key(path.read_bytes(), None)
        keys[str(path)] = key.private_numbers().private_value.to_bytes(key.key_size // 8, "big")  # type: ignore[union-attr]
    return keys


def data_keys(network: Shell) -> list[bytes]:
    """Every data key in the coordinator's database, opened."""
    state = network.layout.state("coordinator")
    keyring = FileKeyring(state / "keyring.json", SystemClock())
    with closing(sqlite3.connect(f"file:{state / 'coordinator.db'}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT job_id, key_id, epoch, kek_id, wrapped FROM data_key WHERE wrapped IS NOT NULL"
        ).fetchall()
    made = []
    for job_id, key_id, epoch, kek_id, wrapped in rows:
        context = "\n".join(("cortex data key at rest v1", "cortex", job_id, key_id, str(epoch))).encode()
        made.append(keyring.unwrap(RestingKey(kek_id, wrapped), context))
    return made


@contextmanager
def worker_elsewhere(network: Shell, name: str, token: str, url: str) -> Iterator[None]:
    """A worker without a certificate, behind the gateway."""
    settings = {"NAME": name, "REGION": "eu", "NODE_TOKEN": token, "GATEWAY_URL": url, "STATE_DIR": f"{name}-state"}
    settings |= {"CATALOGUE": str(network.folder / "own" / f"{name}.yaml")}
    environment = network.environment | {f"CORTEX_{key}": value for key, value in settings.items()}
    with (network.folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "cortex", "serve", "worker"]
        process = subprocess.Popen(command, cwd=network.folder, env=environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


def test_the_recorder_sees_through_the_masks_of_a_websocket(monkeypatch: pytest.MonkeyPatch):
    secret, record = os.urandom(70_000), bytearray()
    frames = Frames(record)
    protocol = ClientProtocol(parse_uri("ws://localhost"))
    protocol.send_request(protocol.connect())
    sent = [*protocol.data_to_send()]
    protocol.state = State.OPEN
    for piece in (secret[:20], secret[:300], secret):
        protocol.send_binary(piece)
        sent += protocol.data_to_send()
    data = b"".join(sent)
    assert secret[:20] not in data
    for place in range(0, len(data), 1000):
        frames += data[place : place + 1000]
    assert record.startswith(b"GET / HTTP/1.1")
    assert record.endswith(secret[:20] + secret[:300] + secret)


def test_every_appearance_of_a_secret_is_found():
    secret = bytes(range(200, 232))
    for where in (b"", b"a", b"bc", b"def"):
        for text in (where + secret + b"x", (where + secret).hex().encode()):
            assert found_in({"s": secret}, {"file": text})
    for where in (b"", b"a", b"bc", b"def"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert found_in({"s": secret}, {"file": encode(where + secret + b"tail")})
    assert not found_in({"s": secret}, {"file": base64.b64encode(os.urandom(4096)) + os.urandom(4096)})
    assert min(map(len, appearances(secret))) >= 28


def test_nothing_is_written_or_sent_in_the_clear(shell: Shell):
    own, members = shell.folder / "own", read_network(shell.layout)
    operator = shell.layout.tls("operator")
    recorder = Recorder()
    with recorder.running():
        proxies = put_between(shell, members, recorder)
        (shell.folder / "job.yaml").write_text(JOB.format(weights=own / "weights.safetensors"))
        token = shell.json("node", "token", "--role", "worker", "--name", "eu-9")["token"]
        joined = shell.run(
            "node", "enroll", token, "--out", str(own / "eu-9"), "--at",
            recorder.before(members.address(Role.DISCOVERY, "enrolment")),
        )  # fmt: skip
        assert joined.returncode == 0, joined.stderr
        shell.variables = {
            "CORTEX_ENDPOINT": proxies[Role.COORDINATOR],
            "CORTEX_DISCOVERY": proxies[Role.DISCOVERY],
            "CORTEX_CA": str(operator.ca),
            "CORTEX_CERTIFICATE": str(operator.certificate),
            "CORTEX_KEY": str(operator.key),
        }
        named = ("--name", "ward-3", "--region", "eu")
        node_token = shell.run("node", "token", "--gateway", *named).stdout.strip()
        web, line = (members.address(Role.GATEWAY, use) for use in ("http", "websocket"))
        with worker_elsewhere(shell, "ward-3", node_token, f"ws://{recorder.before(line, frames=True)}"):
            until(lambda: "ward-3" in {node["name"] for node in shell.json("nodes")}, 60)
            status = shell.json("submit", "job.yaml", "--wait")
        assert status["status"] == "completed", status
        assert [report["accepted"] for report in status["history"]] == [3, 3, 3]
        shell.json("model", "download", status["job_id"], "-o", str(own / "model.safetensors"))
        api_token = shell.layout.token_file.read_text().strip().encode()
        api, bearer = f"http://{recorder.before(web)}/api/v1", {"Authorization": f"Bearer {api_token.decode()}"}
        for path in ("network/status", "network/resources", f"jobs/{status['job_id']}/status"):
            assert httpx.get(f"{api}/{path}", headers=bearer).status_code == 200
        downloaded = httpx.get(f"{api}/jobs/{status['job_id']}/model", headers=bearer)
        assert downloaded.content == (own / "model.safetensors").read_bytes()

    with np.load(own / "eu-1.npz") as arrays:
        data = arrays["x"][3].tobytes()
    weights = safetensors.numpy.load_file(own / "weights.safetensors")["hidden_1.weight"][5].tobytes()
    keys = private_keys(shell.layout.root) | private_keys(own)
    keyring = shell.layout.state("coordinator") / "keyring.json"
    [kek] = [bytes.fromhex(each) for each in re.findall(r'"([0-9a-f]{64})"', keyring.read_text())]
    canaries = {
        "weights": weights,
        "data": data,
        "key-encryption key": kek,
        "API token": api_token,
        "API token's secret": api_token.rpartition(b"_")[2],
        "join token": token.encode(),
        "join token's secret": JoinToken.decode(token).secret,
        "node token": node_token.encode(),
        "node token's secret": NodeToken.decode(node_token).secret,
        **{f"data key {number}": key for number, key in enumerate(data_keys(shell))},
        **{f"private key of {path}": key for path, key in keys.items()},
    }
    assert len(canaries) > 16
    assert "data key 0" in canaries
    # Where each may be, and must be found, or the search is worth nothing.
    places = {
        ("weights", str(own / "weights.safetensors")),
        ("weights", str(own / "model.safetensors")),
        ("data", str(own / "eu-1.npz")),
        ("key-encryption key", str(keyring)),
        ("API token", str(shell.layout.token_file)),
        ("API token's secret", str(shell.layout.token_file)),
        *((f"private key of {path}", path) for path in keys),
        # On loopback the gateway speaks plain HTTP: so are its callers' tokens, and the models that they ask for.
        ("API token", f"traffic of {web}"),
        ("API token's secret", f"traffic of {web}"),
        ("weights", f"traffic of {web}"),
    }
    assert sum(map(len, recorder.passed.values())) > 3 * 2 * 2 * 4 * HIDDEN * INPUTS
    plain = {where: recorder.passed[f"traffic of {where}"] for where in (web, line)}
    assert all(record.startswith(b"GET ") for record in plain.values())
    # As plain as HTTP; the updates that went over it are sealed all the same.
    assert b"ward-3" in plain[line]
    assert len(plain[line]) > 3 * 2 * 4 * HIDDEN * INPUTS
    encrypted = [record for where, record in recorder.passed.items() if where.removeprefix("traffic of ") not in plain]
    assert all(record.startswith(b"\x16\x03") for record in encrypted if record)
    contents = files_below([shell.folder]) | {where: bytes(record) for where, record in recorder.passed.items()}

    assert found_in(canaries, contents) == places
    private = [str(keyring), str(shell.layout.token_file), *keys]
    assert {path: oct(Path(path).stat().st_mode & 0o777) for path in private} == dict.fromkeys(private, "0o600")
