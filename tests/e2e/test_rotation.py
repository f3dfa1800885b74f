"""Every certificate and key of a network replaced again and again under a job that is running: nobody notices."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from cortex import Client
from cortex.local.detached import stop_network
from cortex.local.network import CertificateLives, LocalNetwork, read_network
from cortex_common.errors import CortexError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.security.certificates import certificate_of
from tests.e2e.conftest import WIDE, Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(360)]

LIVES = CertificateLives(leaf_s=20, issuing_s=40, root_s=40)
# Of 0.6 s each at least: 66 s, of which three times half of a root's life, or the whole of a key's, are 60.
ROUNDS = 110
# More than the two jobs need on a machine that does much else.
LONGEST_S = 240
KEY_LIVES = MappingProxyType({"data_key_age_s": 20.0, "kek_age_s": 20.0})
# Warnings by which nobody is troubled, and why.
HARMLESS: Mapping[str, str] = MappingProxyType(
    {
        "node_suspected": "heartbeats came late because the machine does much else; no work is taken from the node",
        "node_revived": "the next one came; that its lease ran out before would be another warning",
        "certificate_files_not_usable": "certificate and key are replaced one after the other; who looks in between "
        "keeps what it has and looks again",
    }
)


@pytest.fixture(scope="module")
def short_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A network whose certificates end within a minute."""
    shell = Shell(tmp_path_factory.mktemp("short"))
    shell.layout.root.mkdir()
    shell.layout.network_file.write_text(LocalNetwork(workers=2, lives=LIVES).model_dump_json())
    done = shell.run("up", "--detach")
    try:
        assert done.returncode == 0, done.stderr
        yield shell
    finally:
        stop_network(shell.layout)


@dataclass
class Seen:
    """Certificates of nodes, authorities and key-encryption keys that there have been, looked at again and again."""

    network: Shell
    leaves: dict[str, set[int]] = field(default_factory=dict)
    authorities: dict[str, set[str]] = field(default_factory=dict)
    keks: set[str] = field(default_factory=set)

    def look(self) -> None:
        for folder in self.network.layout.certificates.iterdir():
            leaf = certificate_of(TlsFiles(folder / "ca.pem", folder / "tls.crt", folder / "tls.key"))
            self.leaves.setdefault(folder.name, set()).add(leaf.serial)
        for kind in ("root", "issuing"):
            made = {path.name for path in self.network.layout.authority.glob(f"{kind}-*.crt")}
            self.authorities.setdefault(kind, set()).update(made)
        self.keks.update(keks_of(self.network))

    @property
    def fewest_rotations(self) -> int:
        seen = [*self.leaves.values(), *self.authorities.values(), self.keks]
        return min(len(each) for each in seen) - 1


def keks_of(network: Shell) -> list[str]:
    """Key-encryption keys there are, oldest first."""
    document = json.loads((network.layout.state("coordinator") / "keyring.json").read_bytes())
    return sorted(document["keys"])


def server_events(network: Shell, job_id: str, kind: str) -> list[tuple[str, Any]]:
    """Everything an HTTP client is told until the job has ended."""
    members = read_network(network.layout)
    headers = {"Authorization": f"Bearer {network.layout.token_file.read_text().strip()}"}
    url = f"http://{members.address(Role.GATEWAY, 'http')}/api/v1/jobs/{job_id}/events?kind={kind}"
    told, name = [], ""
    with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                told.append((name, json.loads(value)))
    return told


def ended(submission: subprocess.Popen[str]) -> Any:
    """What `cortex submit --wait --json` says of the job at its end."""
    out, err = submission.communicate(timeout=LONGEST_S)
    assert submission.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def logs(network: Shell) -> dict[str, list[str]]:
    """What each process of a network has written, by line."""
    return {path.name: path.read_text().splitlines() for path in network.layout.logs.iterdir()}


def is_visible(line: str) -> bool:
    """Whether a line tells of an error or a warning, or comes from something that has its own way to complain."""
    try:
        told = json.loads(line)
    except ValueError:
        return bool(line)
    return told["level"] not in ("debug", "info") and (told["level"] != "warning" or told["event"] not in HARMLESS)


def test_a_job_goes_on_while_every_certificate_and_key_is_replaced_three_times(network: Shell, short_lived: Shell):
    short_lived.slow_down(KEY_LIVES)
    # The calm job runs beside the drilled one, in a network of its own; that one waits for its links most of the time.
    calm = network.start("submit", network.job(ROUNDS, WIDE), "--wait", "--json")
    logged, started = logs(short_lived), short_lived.processes()
    seen = Seen(short_lived)
    seen.look()

    watcher = short_lived.start("submit", short_lived.job(ROUNDS, WIDE), "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]
    with ThreadPoolExecutor() as threads, Client(directory=short_lived.layout.root) as client:
        following: dict[str, Future[list[Any]]] = {
            "status": threads.submit(server_events, short_lived, job_id, "status"),
            "events": threads.submit(server_events, short_lived, job_id, "events"),
            "sdk": threads.submit(lambda: list(client.events(job_id, follow=True))),
        }
        while not client.status(job_id).status.is_terminal:
            seen.look()
            threading.Event().wait(0.5)
        epochs = client.keys(job_id)
        told = {name: each.result(timeout=30) for name, each in following.items()}

    status, calm_status = ended(watcher), ended(calm)
    assert [entry["round"] for entry in status["history"]] == list(range(1, ROUNDS + 1))
    assert all(entry["accepted"] == 2 for entry in status["history"])
    assert status["model"]["sha256"] == calm_status["model"]["sha256"]
    assert seen.fewest_rotations >= 3, seen
    assert sum(epoch.reason.endswith(" s old") for epoch in epochs) >= 3, epochs
    lines = {name: lines[len(logged[name]) :] for name, lines in logs(short_lived).items()}
    assert [(name, line) for name, each in lines.items() for line in each if is_visible(line)] == []
    assert short_lived.processes() == started

    assert told["status"][-1][0] == told["events"][-1][0] == "end"
    sequence = [event["sequence"] for name, event in told["events"] if name == "event"]
    assert sequence == [event.sequence for event in told["sdk"]] == list(range(1, len(sequence) + 1))
    assert {"round_retried", "seat_given_on"}.isdisjoint(event.name for event in told["sdk"])


# 0.77 s each: more than three starts of a coordinator take.
KILLED_ROUNDS = 24


@dataclass
class Coordinator:
    """The coordinator of a network with a job at work: its keys at rest, and its deaths."""

    network: Shell
    client: Client
    job_id: str

    @property
    def keks(self) -> list[str]:
        """Key-encryption keys there are, oldest first."""
        return keks_of(self.network)

    @property
    def keks_in_use(self) -> set[str]:
        """Those that a data key rests under."""
        with closing(self._database("mode=ro")) as connection:
            rows = connection.execute("SELECT DISTINCT kek_id FROM data_key WHERE length(wrapped) > 0")
            return {kek_id for (kek_id,) in rows}

    def held(self) -> sqlite3.Connection:
        """Nothing is written to its database until this is closed."""
        connection = self._database("mode=rw")
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def die(self) -> None:
        """kill -9; the next one is at work, and a round further, when this returns."""
        before = self.network.processes()["coordinator"]
        os.kill(before, signal.SIGKILL)
        until(lambda: self.network.processes().get("coordinator", before) != before, 30)
        until(lambda: self._round() >= 0, 30)
        reached = self._round()
        until(lambda: self._round() > reached, 30)

    def _round(self) -> int:
        with suppress(UnavailableError):
            return self.client.status(self.job_id).round
        return -1

    def _database(self, mode: str) -> sqlite3.Connection:
        path = self.network.layout.state("coordinator") / "coordinator.db"
        return sqlite3.connect(f"file:{path}?{mode}", uri=True, isolation_level=None, timeout=10)


def test_a_coordinator_that_dies_around_a_rotation_of_its_key_goes_on_with_the_job(network: Shell):
    """kill -9 before it, between the new key and what it is for, and after it."""
    calm = network.json("submit", network.job(KILLED_ROUNDS, WIDE), "--wait")
    network.slow_down()
    watcher = network.start("submit", network.job(KILLED_ROUNDS, WIDE), "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]
    with Client(directory=network.layout.root) as client, ThreadPoolExecutor() as threads:
        coordinator = Coordinator(network, client, job_id)
        until(lambda: client.status(job_id).round >= 1)
        first = coordinator.keks
        coordinator.die()
        assert coordinator.keks == first

        with closing(coordinator.held()):
            rotating = threads.submit(client.rotate_key_encryption_key)
            until(lambda: len(coordinator.keks) == 2)
            assert coordinator.keks_in_use == set(first)
            os.kill(network.processes()["coordinator"], signal.SIGKILL)
        with suppress(CortexError):
            rotating.result(timeout=60)
        # What was broken off goes on by itself, and the key of before is destroyed.
        until(lambda: coordinator.keks_in_use == set(coordinator.keks) and set(first).isdisjoint(coordinator.keks), 60)

        made, _ = client.rotate_key_encryption_key()
        coordinator.die()
        assert coordinator.keks == [made]
        assert coordinator.keks_in_use == {made}

    status = ended(watcher)
    assert [entry["round"] for entry in status["history"]] == list(range(1, KILLED_ROUNDS + 1))
    assert all(entry["accepted"] == 2 for entry in status["history"])
    assert status["model"]["sha256"] == calm["model"]["sha256"]
