"""PostgreSQL and an S3 server instead of SQLite and files, switched on by settings alone: the profile `scale`.

Needs what test_compose.py needs, and images of both servers. The tests are one story, told in order: a small job is
trained; another one is disturbed, taken down in its middle, and goes on; in the end it is compared, round by round,
with the same job that nobody disturbed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api import DIGITS, until
from compose import Compose, running
from faults import killed
from invariants import Disturbances, counted_once

AGGREGATORS = ("aggregator-eu", "aggregator-us", "aggregator-global")
STATE = "/var/lib/cortex"
# Run where the S3 server can be reached, with an aggregator's own settings.
READ_BUCKET = """
import base64, json, os, s3fs
key, secret = (open(os.environ[f"CORTEX_S3_{each}_FILE"]).read().strip() for each in ("KEY", "SECRET"))
bucket = s3fs.S3FileSystem(key=key, secret=secret, client_kwargs={"endpoint_url": os.environ["CORTEX_S3_ENDPOINT"]})
print(json.dumps({name: base64.b64encode(bucket.cat_file(name)).decode() for name in bucket.find("cortex")}))
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The system with both stores, running."""
    with running(tmp_path_factory.mktemp("scale"), "scale") as compose:
        yield compose


@pytest.fixture(scope="module")
def drill(network: Compose) -> Disturbances:
    return Disturbances(lambda: network.api)


@pytest.fixture(scope="module")
def done(network: Compose) -> dict[str, Any]:
    """The small job, when it was done."""
    return network.api.completed(network.api.submit(json.loads(DIGITS.read_text())))


def rows(network: Compose, query: str) -> list[list[str]]:
    """What PostgreSQL answers."""
    login = ("psql", "--username", "cortex", "--dbname", "cortex")
    told = network.docker("exec", network.container("postgres-1"), *login, "--csv", "--tuples-only", "--command", query)
    return [line.split(",") for line in told.splitlines()]


def objects(network: Compose) -> dict[str, bytes]:
    """All that is in the S3 server's bucket: bucket/name, and the bytes."""
    told = network.docker("exec", network.container("aggregator-global-1"), "python", "-c", READ_BUCKET)
    return {name: base64.b64decode(content) for name, content in json.loads(told).items()}


def files(network: Compose, service: str) -> list[str]:
    """What a service keeps in its own volume."""
    return network.docker("exec", network.container(f"{service}-1"), "find", STATE, "-type", "f").split()


def model(network: Compose, job_id: str) -> bytes:
    """The trained model as people fetch it."""
    answer = httpx.get(f"{network.api.url}/api/v1/jobs/{job_id}/model", headers=network.api._headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_jobs_and_nodes_are_in_postgres(network: Compose, done: dict[str, Any]) -> None:
    assert done["metrics"]["test_accuracy"] > 0.9
    counted_once(done)
    assert rows(network, "SELECT id, stage FROM job") == [[done["job_id"], "completed"]]
    trained = rows(network, "SELECT round, sha256 FROM version WHERE round > 0 ORDER BY round")
    assert trained == [[str(entry["round"]), entry["model_sha256"]] for entry in done["history"]]
    nodes = [*AGGREGATORS, *network.api.live("worker")]
    found = rows(network, "SELECT name FROM discovery_node WHERE role IN ('aggregator', 'worker')")
    assert sorted(name for (name,) in found) == sorted(nodes)
    assert not [file for file in files(network, "coordinator") if ".db" in file]
    assert f"{STATE}/nodes.json" not in files(network, "discovery")


def test_sealed_versions_are_objects_in_s3_and_not_in_volumes(network: Compose, done: dict[str, Any]) -> None:
    kept = rows(network, "SELECT aggregator, job_id, round, sha256 FROM version WHERE pruned = 0")
    assert done["model"]["sha256"] in [sha256 for *_, sha256 in kept]
    stored = objects(network)
    for aggregator, job_id, number, sha256 in kept:
        facts = json.loads(stored[f"cortex/{aggregator}/{job_id}/{number}.json"])
        assert facts["header"]["model_sha256"] == sha256
        assert len(stored[f"cortex/{aggregator}/{facts['blob']}"]) == sum(facts["sizes"])
    plain = model(network, done["job_id"])
    numbers = plain[8 + int.from_bytes(plain[:8], "little") :]
    assert len(numbers) == 4 * done["model"]["parameters"]
    everything = b"".join(stored.values())
    assert not [at for at in range(0, len(numbers) - 16, 64) if numbers[at : at + 16] in everything]
    for aggregator in AGGREGATORS:
        own = files(network, aggregator)
        assert own
        assert not [file for file in own if "/versions/" in file or file.endswith(".blob")]


def test_a_job_goes_on_after_kills_and_after_down_and_up(
    network: Compose, done: dict[str, Any], drill: Disturbances
) -> None:
    trained = model(network, done["job_id"])
    with drill.disturbed() as job_id:
        for name in ("coordinator-1", "aggregator-global-1"):
            print(f"round {network.api.gets_further(job_id)}: {name} killed")
            killed(name)(network)
            until(f"all are well after {name} was killed", network.is_well)
        print(f"round {network.api.gets_further(job_id)}: down and up")
        network.run("down")
        network.up()
        assert network.api.status(done["job_id"]) == done
        assert model(network, done["job_id"]) == trained
        network.api.gets_further(job_id)


def test_every_round_is_that_of_a_job_that_nobody_disturbed(drill: Disturbances) -> None:
    print(f"{len(drill.undisturbed()['history'])} rounds")
