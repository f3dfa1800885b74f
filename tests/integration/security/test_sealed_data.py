"""Sealed data from `cortex data seal` to a trained model: through coordinator, aggregators and real workers."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cortex.cli.main import main
from cortex.client import Client
from cortex.connection import Connection
from cortex.shipping import read_manifest
from cortex_common.data.builtin import read_digits
from cortex_common.data.normalise import DIGITS
from cortex_common.data.sealed import Described
from cortex_common.errors import CorruptError, InvalidArgumentError
from cortex_common.identity import Role
from cortex_common.ids import JobId, RoundNumber
from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.rpc.channel import open_channel
from cortex_common.security.shards import ShardIntake, dataset_key, shard_key
from cortex_common.security.signing import SigningKey
from cortex_common.transfer import ChunkFrame
from cortex_common.transfer.pull import pull_frames, pull_request
from tests.integration.coordinator.harness import Site, TlsOf
from tests.integration.worker.gateways import files
from tests.integration.worker.harness import working
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")
IMAGE = read_digits("train")[0][100]
CANARY = IMAGE.tobytes()
"""The 64 bytes of one of the images."""


@dataclass
class Place:
    """A network with two real workers, and somebody's data set."""

    cortex: Site
    root: Path
    told: Described
    key: bytes

    def stored(self, index: int) -> Path:
        """A shard as the aggregator keeps it."""
        digest = self.told.manifest.shards[index].sha256
        return self.root / "state" / "aggregator" / "shards" / f"{digest}.shard"

    def addresses(self) -> list[str]:
        with self.client() as client:
            return [str(node.address) for node in client.nodes() if node.role == Role.AGGREGATOR]

    def client(self) -> Client:
        tls = self.cortex.tls_of(Role.OPERATOR, "ann")
        return Client(Connection(self.cortex.coordinator, self.cortex.discovery, tls, "the test"))

    async def add(self) -> list[str]:
        def there() -> list[str]:
            with self.client() as client:
                return client.add_dataset(self.root / "marked.sealed", self.told, self.key, "default")

        return await asyncio.to_thread(there)

    async def train(self, train: str, **sections: Any) -> JobStatus:
        job = {
            "model": {"input_dim": 64, "hidden_dims": [16], "output_dim": 10},
            "data": {"train": train, "test": "digits-test"},
            "training": {"rounds": 2, "learning_rate": 0.01},
            "placement": {"workers": 2, "min_workers": 2},
            "aggregation": {"quorum": 1.0},
        }

        def there() -> JobStatus:
            with self.client() as client:
                return client.wait(client.submit(job | sections))

        return await asyncio.to_thread(there)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    root = tmp_path_factory.mktemp("sealed")
    (root / "planted").write_bytes(CANARY)
    SigningKey.create(root / "ann.key")
    told, key = sealed_by_command(root, "marked", "digits")
    async with AsyncExitStack() as stack:
        cortex = Site(tls_of, root / "state")
        stack.push_async_callback(cortex.close)
        # A machine that is busy changes nothing: rounds wait for both workers.
        cortex.coordinator_settings = {"tries": 1, "lease_s": 60.0, "gather_s": 60.0}
        for service in ("discovery", "aggregator", "coordinator"):
            await cortex.start(service)
        for name, region in (("w1", "eu"), ("w2", "us")):
            where = {"coordinator": cortex.coordinator, "discovery": cortex.discovery, "region": region}
            await stack.enter_async_context(working(name, root / "state", **where, **files(tls_of(Role.WORKER, name))))
        made = Place(cortex, root, told, key)
        assert await made.add() == ["aggregator-1"]
        yield made


def sealed_by_command(root: Path, name: str, source: str) -> tuple[Described, bytes]:
    """What `cortex data seal` makes of a data set."""
    folder, key_file = root / f"{name}.sealed", root / f"{name}.datakey"
    command = ["data", "seal", name, source, "--shards", "2", "--key", str(root / "ann.key")]
    assert main([*command, "--output", str(folder), "--data-key", str(key_file)]) == 0
    return read_manifest(folder), bytes.fromhex(json.loads(key_file.read_text())["key"])


def files_with(folder: Path, *needles: bytes) -> list[Path]:
    """Files below a folder that hold one of these."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if any(needle in _content(path) for needle in needles)]


def _content(path: Path) -> bytes:
    """Of a file; of one that a service has just removed, nothing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def opened_memory() -> list[str]:
    """Memory of opened shards in this process, whose workers are threads of it."""
    gc.collect()
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [name for path in links if "cortex-shards" in (name := str(path.readlink()))]


async def test_a_job_on_sealed_data_learns_what_it_learns_in_the_clear_and_leaves_nothing(place: Place) -> None:
    plain = await place.train("digits")
    sealed = await place.train(place.told.reference)
    assert (plain.status, sealed.status) == (JobPhase.COMPLETED, JobPhase.COMPLETED), (plain.error, sealed.error)
    assert sealed.history[-1].metrics["test_accuracy"] > 0.8
    assert sealed.model
    assert plain.model
    assert sealed.model.sha256 == plain.model.sha256

    await eventually(lambda: not opened_memory())
    seen = CANARY, DIGITS.apply(IMAGE[None]).tobytes()
    assert [path.name for path in files_with(place.root, *seen)] == ["planted"], "and no other"
    keys = place.key, place.key.hex().encode(), base64.b64encode(place.key)
    assert [path.name for path in files_with(place.root, *keys)] == ["marked.datakey"]


async def test_a_shard_that_was_changed_is_refused_and_says_so(place: Place) -> None:
    """Also the aggregator's own copy: what opens is what the owner has sealed, or nothing."""
    path = place.stored(0)
    sound = path.read_bytes()
    spoilt = bytearray(sound)
    spoilt[1000] ^= 1
    path.write_bytes(spoilt)
    try:
        status = await place.train(place.told.reference, placement={"workers": 1}, training={"rounds": 1})
    finally:
        path.write_bytes(sound)
    assert status.status is JobPhase.FAILED
    assert "data.train: chunk 0 of shard 0 of data set marked does not open" in str(status.error)


async def test_who_gets_a_shard_without_its_key_has_nothing(place: Place) -> None:
    """Another node of the network may fetch the bytes; the key of the other shard opens them as little as none."""
    manifest, data_key = place.told.manifest, dataset_key(place.told.manifest, place.key)
    tls = place.cortex.tls_of(Role.WORKER, "stranger")
    (aggregator,) = await asyncio.to_thread(place.addresses)
    async with open_channel(aggregator, tls, Role.AGGREGATOR, bulk=True) as channel:
        request = pull_request(JobId("any"), manifest.shards[0].sha256, 0, RoundNumber(0))
        frames = [frame async for frame in pull_frames(channel, request, "fetching a shard")]
        assert isinstance(frames[1], ChunkFrame)
        assert CANARY not in bytes(frames[1].sealed)
        memory = bytearray(manifest.shard_bytes(0))
        other = replace(shard_key(data_key, 1), key_id=shard_key(data_key, 0).key_id)
        intake = ShardIntake(manifest, 0, other, memoryview(memory))
        with pytest.raises(CorruptError, match="does not open"):
            intake.take(0, frames[1].sealed)
        assert not any(memory)
        intake = ShardIntake(manifest, 0, shard_key(data_key, 0), memoryview(memory))
        intake.take(0, frames[1].sealed)
        intake.finish()
    assert any(memory)


async def test_its_key_outlives_key_encryption_keys_and_restarts_until_it_is_removed(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _ = sealed_by_command(place.root, "test", "digits-test")
    tls = place.cortex.tls_of(Role.OPERATOR, "ann")
    found = {"ENDPOINT": place.cortex.coordinator, "DISCOVERY": place.cortex.discovery}
    for name, value in (found | {"CA": tls.ca, "CERTIFICATE": tls.certificate, "KEY": tls.key}).items():
        monkeypatch.setenv(f"CORTEX_{name}", str(value))

    async def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(main, ["data", *arguments])
        return (code, *capsys.readouterr())

    folder, key = str(place.root / "test.sealed"), str(place.root / "test.datakey")
    code, _, error = await command("add", folder, "--data-key", str(place.root / "marked.datakey"))
    assert (code, "holds the key of sealed:marked@" in error) == (1, True)
    code, said, _ = await command("add", folder, "--data-key", key)
    assert (code, said) == (0, f"{told.reference}\n")
    code, _, error = await command("add", folder, "--data-key", key, "--org", "others")
    assert (code, "is known for default already" in error) == (1, True)
    with place.client() as client:
        made, _ = await asyncio.to_thread(client.rotate_key_encryption_key)
    await place.cortex.stop("coordinator")
    await place.cortex.start("coordinator")
    ring = json.loads((place.root / "state" / "coordinator" / "keyring.json").read_text())
    assert list(ring["keys"]) == [made], "the older one is gone"
    one = {"placement": {"workers": 1}, "training": {"rounds": 1}}
    assert (await place.train(told.reference, **one)).status is JobPhase.COMPLETED
    _, listed, _ = await command("sealed", "--json")
    facts = [(each["reference"], each["examples"], each["shards"], each["org"]) for each in json.loads(listed)]
    assert facts == [(place.told.reference, 1438, 2, "default"), (told.reference, 359, 2, "default")]
    code, said, _ = await command("remove", told.reference)
    assert (code, "its key is erased, and 2 shards are gone" in said) == (0, True)
    code, _, error = await command("remove", told.reference)
    assert (code, "no data set with the digest" in error) == (1, True)
    kept = [path.stem for path in place.stored(0).parent.glob("*.shard")]
    assert sorted(kept) == sorted(shard.sha256 for shard in place.told.manifest.shards)
    with pytest.raises(InvalidArgumentError, match="no node has such a dataset"):
        await place.train(told.reference, **one)


async def test_a_job_cannot_have_more_workers_than_there_are_shards(place: Place) -> None:
    with pytest.raises(InvalidArgumentError, match=r"placement.workers: 3 given; sealed:marked@\w+ has 2 shards"):
        await place.train(place.told.reference, placement={"workers": 3})


async def test_where_every_region_has_its_aggregator_a_job_learns_the_same(place: Place) -> None:
    """One that comes later has none of the shards until the data set is added again."""
    await place.cortex.start("aggregator-us", region="us")
    async with asyncio.timeout(20):
        while len(await asyncio.to_thread(place.addresses)) < 2:  # noqa: ASYNC110 - it has to be asked for
            await asyncio.sleep(0.05)
    folder = place.root / "state" / "aggregator-us" / "shards"
    assert not list(folder.glob("*.shard"))
    assert await place.add() == ["aggregator-1", "aggregator-us"]
    regional = {"aggregation": {"topology": "regional", "quorum": 1.0}}
    plain, sealed = await place.train("digits", **regional), await place.train(place.told.reference, **regional)
    assert (plain.status, sealed.status) == (JobPhase.COMPLETED, JobPhase.COMPLETED), (plain.error, sealed.error)
    assert sealed.model
    assert plain.model
    assert sealed.model.sha256 == plain.model.sha256
    assert sealed.history[-1].bytes_between_regions > 0, "through both aggregators"
    assert {path.stem for path in folder.glob("*.shard")} == {shard.sha256 for shard in place.told.manifest.shards}
    seen = CANARY, DIGITS.apply(IMAGE[None]).tobytes()
    assert [path.name for path in files_with(place.root, *seen)] == ["planted"]
