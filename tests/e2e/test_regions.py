"""Three levels of regions as real processes: every aggregator is killed while a job trains, and nothing shows."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from cortex import Client
from cortex.local.detached import stop_network
from tests.e2e.conftest import Shell
from tests.e2e.test_local_network import pid_of
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
REGIONS = ("eu", "eu.fr", "eu.fr.paris", "eu.fr.lyon")
REGIONAL = {
    "workers: 2, min_workers: 2}": "workers: 4}\naggregation: {topology: regional}\ncompression: {codec: int8}",
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A worker and an aggregator in each region."""
    shell = Shell(tmp_path_factory.mktemp("network"))
    done = shell.run("up", "--detach", "--workers", "4", "--regions", ",".join(REGIONS))
    try:
        assert done.returncode == 0, done.stderr
        yield shell
    finally:
        stop_network(shell.layout)


def test_killing_every_aggregator_in_turn_loses_nothing(network: Shell):
    rounds = 12
    path = network.job(rounds, REGIONAL)
    undisturbed = network.json("submit", path, "--wait")
    watcher = network.start("submit", path, "--wait", "--json")
    assert watcher.stderr is not None
    job_id = watcher.stderr.readline().split()[-1]

    with Client(directory=network.layout.root) as client:
        for done, region in enumerate(("eu.fr", "eu.fr.paris", "eu", "eu.fr")):
            until(lambda done=done: client.status(job_id).round > 2 * done, timeout_s=60)
            assert not client.status(job_id).status.is_terminal
            name = f"aggregator-{region}"
            victim = pid_of(network, name)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            until(lambda name=name, victim=victim: pid_of(network, name) not in (None, victim))

    out, err = watcher.communicate(timeout=200)
    assert watcher.returncode == 0, err
    status = json.loads(out.splitlines()[-1])
    assert [entry["round"] for entry in status["history"]] == list(range(1, rounds + 1))
    assert all(entry["accepted"] == 4 for entry in status["history"])
    assert status["model"]["sha256"] == undisturbed["model"]["sha256"]
    # Paris and Lyon send to eu.fr, and that to eu: as float32, and once each.
    update = 4 * undisturbed["model"]["parameters"]
    crossed = [entry["bytes_between_regions"] for entry in undisturbed["history"][1:]]
    assert crossed == [pytest.approx(6 * update, rel=0.05)] * (rounds - 1)
