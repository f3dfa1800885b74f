"""Jobs with planted weights, data, keys and tokens: nothing that any service writes or sends shows them.

Recorded are gRPC and enrolment, which are TLS, and a gateway's HTTP and WebSocket, which are plain on loopback: there a
worker trains, and a person submits jobs, follows them and downloads a model.
"""

from __future__ import annotations

import base64
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side, State
from websockets.sync.client import connect

from cortex.local.detached import stop_network
from cortex.local.network import LocalNetwork, read_network
from cortex_common.clock import SystemClock
from cortex_common.identity import Role
from cortex_common.security.joining import JoinToken
from cortex_common.security.keyring import FileKeyring, RestingKey
from cortex_common.security.node_tokens import NodeToken
from tests.e2e.canaries import (
    Recorder,
    appearances,
    files_below,
    found_in,
    frames_of,
    said_over_http,
    said_over_websocket,
)
from tests.e2e.conftest import Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

INPUTS, HIDDEN = 16, 32
NODE = "lab-1"
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
    """A network of two workers, each with data of its own; there are data for a third."""
    made = Shell(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    random = np.random.default_rng(5)
    for name in ("eu-1", "us-1", NODE):
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


@pytest.mark.parametrize("part", [64, 5])
def test_what_passed_over_a_websocket_or_in_chunks_is_read_in_one_piece(part: int):
    secret = bytes(range(180, 244))
    parts = [secret[start : start + part] for start in range(0, len(secret), part)]
    node = Protocol(Side.CLIENT, state=State.OPEN)
    node.send_binary(parts[0], fin=len(parts) == 1)
    for index, each in enumerate(parts[1:], start=2):
        node.send_ping(b"in between")
        node.send_continuation(each, fin=index == len(parts))
    record = b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n" + b"".join(node.data_to_send())
    assert secret not in record
    assert b"Upgrade" in said_over_websocket(record, "up")
    assert secret in said_over_websocket(record, "up").replace(b"in between", b"")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in parts)
    assert secret in said_over_http(b"HTTP/1.1 200 OK\r\n\r\n" + chunks + b"0\r\n\r\n", "down")


def node_token(shell: Shell, name: str) -> NodeToken:
    """One for a node without a certificate."""
    return NodeToken.decode(shell.run("node", "token", "--gateway", "--name", name, "--region", "eu").stdout)


@contextmanager
def behind_the_gateway(shell: Shell, gateway: str, token: NodeToken) -> Iterator[None]:
    """A worker on data of its own that has a token, and nothing but a WebSocket to the gateway."""
    own, folder = shell.folder / "own", shell.folder / NODE
    folder.mkdir()
    secret = own / f"{NODE}.token"
    secret.touch(0o600)
    secret.write_text(token.encode())
    settings = {"name": NODE, "region": "eu", "state_dir": str(folder), "catalogue": str(own / f"{NODE}.yaml")}
    settings |= {"gateway_url": f"ws://{gateway}", "gateway_proxy": "none", "node_token_file": str(secret)}
    (folder / "worker.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "cortex", "serve", "worker", "--config", str(folder / "worker.yaml")]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=shell.environment, stdout=log, stderr=log)
    try:
        until(lambda: shell.json("resources")["total"]["workers"] == 3, 60)
        yield
    finally:
        process.terminate()
        process.wait(30)


def use_http(http: str, downloads: str, token: str, job: str) -> str:
    """Do what a person does over HTTP: submit, follow, ask; and download over another line. The job's id."""
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://{http}", headers=headers, timeout=100, trust_env=False) as client:
        submitted = client.post("/api/v1/jobs/submit", json=yaml.safe_load(job))
        assert submitted.status_code < 300, submitted.text
        job_id = str(submitted.json()["job_id"])
        assert "end" in client.get(f"/api/v1/jobs/{job_id}/events").text
        assert client.get(f"/api/v1/jobs/{job_id}/status").json()["status"] == "completed"
        log = {"kind": "events", "follow": "false"}
        assert "job_completed" in client.get(f"/api/v1/jobs/{job_id}/events", params=log).text
        for path in (f"jobs/{job_id}/versions", "jobs", "network/status", "network/resources"):
            assert client.get(f"/api/v1/{path}").status_code == 200
        assert client.get("/api/v1/jobs/nobody/status").status_code == 404
    with httpx.Client(base_url=f"http://{downloads}", headers=headers, timeout=100, trust_env=False) as client:
        assert client.get(f"/api/v1/jobs/{job_id}/model").status_code == 200
    return job_id


def plant(http: str, gateway: str, secret: bytes) -> None:
    """Send a secret in the clear over both lines, as nothing should: in a body, and in two parts of a message."""
    httpx.post(f"http://{http}/api/v1/jobs/submit", content=secret, trust_env=False)
    with connect(f"ws://{gateway}", compression=None, proxy=None) as node:
        node.recv()
        node.send([secret[:20], secret[20:]])
        with suppress(ConnectionClosed):
            node.recv(10)


def test_nothing_is_written_or_sent_in_the_clear(shell: Shell):
    own, members = shell.folder / "own", read_network(shell.layout)
    operator = shell.layout.tls("operator")
    api_token = shell.layout.token_file.read_text().strip()
    job = JOB.format(weights=own / "weights.safetensors")
    recorder = Recorder()
    with recorder.running():
        proxies = put_between(shell, members, recorder)
        http, gateway = (members.address(Role.GATEWAY, use) for use in ("http", "websocket"))
        web = {line: recorder.before(http, line) for line in ("HTTP", "downloads", "planted HTTP")}
        web |= {line: recorder.before(gateway, line) for line in ("WebSocket", "planted WebSocket")}
        (shell.folder / "job.yaml").write_text(job)
        token = shell.json("node", "token", "--role", "worker", "--name", "eu-9")["token"]
        joined = shell.run(
            "node", "enroll", token, "--out", str(own / "eu-9"), "--at",
            recorder.before(members.address(Role.DISCOVERY, "enrolment")),
        )  # fmt: skip
        assert joined.returncode == 0, joined.stderr
        tokens = {NODE: node_token(shell, NODE), "another": node_token(shell, "lab-2")}
        with behind_the_gateway(shell, web["WebSocket"], tokens[NODE]):
            shell.variables = {
                "CORTEX_ENDPOINT": proxies[Role.COORDINATOR],
                "CORTEX_DISCOVERY": proxies[Role.DISCOVERY],
                "CORTEX_CA": str(operator.ca),
                "CORTEX_CERTIFICATE": str(operator.certificate),
                "CORTEX_KEY": str(operator.key),
            }
            status = shell.json("submit", "job.yaml", "--wait")
            assert status["status"] == "completed", status
            assert [report["accepted"] for report in status["history"]] == [3, 3, 3]
            shell.json("model", "download", status["job_id"], "-o", str(own / "model.safetensors"))
            job_id = use_http(web["HTTP"], web["downloads"], api_token, job)
        weights = safetensors.numpy.load_file(own / "weights.safetensors")["hidden_1.weight"][5].tobytes()
        plant(web["planted HTTP"], web["planted WebSocket"], weights)

    keys = private_keys(shell.layout.root) | private_keys(own)
    keyring = shell.layout.state("coordinator") / "keyring.json"
    [kek] = [bytes.fromhex(each) for each in re.findall(r'"([0-9a-f]{64})"', keyring.read_text())]
    canaries = {
        "weights": weights,
        **{f"data of {name}": data_of(own / f"{name}.npz") for name in ("eu-1", NODE)},
        "key-encryption key": kek,
        "API token": api_token.encode(),
        "API token's secret": api_token.split("_", 2)[2].encode(),
        "join token": token.encode(),
        "join token's secret": JoinToken.decode(token).secret,
        **{f"token of {node}": each.encode().encode() for node, each in tokens.items()},
        **{f"secret of {node}": each.secret for node, each in tokens.items()},
        **{f"key of {node}": each._key().private_bytes_raw() for node, each in tokens.items()},
        **{f"data key {number}": key for number, key in enumerate(data_keys(shell))},
        **{f"private key of {path}": key for path, key in keys.items()},
    }
    assert len(canaries) > 23
    assert min(map(len, canaries.values())) >= 32
    assert {"data key 0", "data key 1"} <= set(canaries)
    token_file, node_file = str(shell.layout.token_file), str(own / f"{NODE}.token")
    # Where each may be, and must be found, or the search is worth nothing.
    places = {
        ("weights", str(own / "weights.safetensors")),
        ("weights", str(own / "model.safetensors")),
        *((f"data of {name}", str(own / f"{name}.npz")) for name in ("eu-1", NODE)),
        ("key-encryption key", str(keyring)),
        *((f"API token{part}", token_file) for part in ("", "'s secret")),
        *((f"{part} of {NODE}", node_file) for part in ("token", "secret")),
        *((f"private key of {path}", path) for path in keys),
        # HTTP has no other way to say who asks, and who downloads a model wants it opened: so plain HTTP is for
        # loopback, and elsewhere there is HTTPS. Nothing is exempt on a node's WebSocket, not even its own token.
        *((f"API token{part}", f"{line}, up") for part in ("", "'s secret") for line in ("HTTP", "downloads")),
        ("weights", "downloads, down"),
        *(("weights", f"planted {line}, up") for line in ("HTTP", "WebSocket")),
    }
    sealed = {at: records for at, records in recorder.passed.items() if at[0] not in web}
    assert sum(len(record) for records in sealed.values() for record in records) > 3 * 2 * 2 * 4 * HIDDEN * INPUTS
    assert all(record.startswith(b"\x16\x03") for records in sealed.values() for record in records if record)
    contents = files_below([shell.folder])
    contents |= {f"traffic of {line}, {way}": b"".join(records) for (line, way), records in sealed.items()}
    for line in web:
        contents |= recorder.said(line, said_over_websocket if "WebSocket" in line else said_over_http)

    assert found_in(canaries, contents) == places
    private = [str(keyring), token_file, *keys]
    assert {path: oct(Path(path).stat().st_mode & 0o777) for path in private} == dict.fromkeys(private, "0o600")
    check_that_plain_text_is_seen(recorder, contents, [status["job_id"], job_id])


def check_that_plain_text_is_seen(recorder: Recorder, contents: Mapping[str, bytes], jobs: Sequence[str]) -> None:
    """What is in the clear on each line, in each direction, is read: names, ids, and how much was sealed."""
    for line, words in {
        "HTTP, up": [b"POST /api/v1/jobs/submit", b"hidden_1.*", jobs[1].encode()],
        "HTTP, down": [b"text/event-stream", b"round_closed", jobs[1].encode()],
        "WebSocket, up": [b"Upgrade: websocket", f'"{NODE}"'.encode(), *map(str.encode, jobs)],
        "WebSocket, down": [b"101 Switching Protocols", b"hidden_1.*", *map(str.encode, jobs)],
    }.items():
        assert [word for word in words if word not in contents[line]] == [], line
    carried = {way: recorder.passed["WebSocket", way] for way in ("up", "down")}
    assert not any(f'"{NODE}"'.encode() in record for record in carried["up"]), "masked, as it passed"
    for way, least_bytes in (("up", 3 * 4 * 2 * HIDDEN), ("down", 3 * 4 * HIDDEN * INPUTS)):
        frames = [frame for record in carried[way] for frame in frames_of(bytes(record), way)]
        assert sum(len(frame.data) for frame in frames if frame.opcode is Opcode.BINARY) > least_bytes


def data_of(path: Path) -> bytes:
    """One example of a node's data, as it lies in memory."""
    with np.load(path) as arrays:
        return bytes(arrays["x"][3].tobytes())
