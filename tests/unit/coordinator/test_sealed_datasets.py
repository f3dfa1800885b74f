"""Sealed data sets at the coordinator: whose jobs may use them, and which seat gets which key."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import BYTES
from cortex_common.errors import AlreadyExistsError, ForbiddenError, InvalidArgumentError, NotFoundError
from cortex_common.ids import NodeName, SeatIndex
from cortex_common.security.keyring import FileKeyring
from cortex_common.security.shards import seal_dataset, shard_key
from cortex_common.security.signing import SigningKey
from services.coordinator.datasets import SealedDatasets
from services.coordinator.domain.seen import Dataset as Known
from services.coordinator.keys import JobKeys
from services.coordinator.memory_store import MemoryStore
from services.coordinator.store_thread import StoreThread
from tests.fakes import ManualClock
from tests.unit.coordinator.jobs import collecting

ANN = NodeName("ann")


class Bench:
    """A store, a keyring, a data set of five shards, and whatever takes them up again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.store = MemoryStore()
        self.fence = self.store.acquire("me", 1.0)
        self.thread = StoreThread(self.store)
        data = Dataset(DatasetInfo("any", (64,), 10, 10), np.zeros((10, 64), np.uint8), np.arange(10), BYTES)
        parts = np.array_split(np.arange(10), 5)
        key = SigningKey.create(folder / "ann.key")
        self.told, self.key = seal_dataset("ward", data, parts, key, folder / "ward", datetime.now(UTC))
        self.manifest = self.told.envelope.to_json()
        self.datasets = self.again()

    def again(self, ring: str = "keyring.json") -> SealedDatasets:
        self.ring = FileKeyring(self.folder / ring, self.clock)
        self.keys = JobKeys("net", self.thread, self.ring, self.clock, lambda *_: None)
        made = SealedDatasets("net", self.thread, self.keys, self.ring, self.clock, self.fence)
        self.keys.others.append(made.rewrap)
        return made

    async def add(self, org: str = "acme") -> None:
        await self.datasets.add(self.manifest, self.key.key, org, ANN)

    def job(self, org: str = "acme"):
        return replace(collecting("a", "b", data={"train": self.told.reference}), org=org)


@pytest.fixture
def bench(tmp_path: Path):
    made = Bench(tmp_path)
    yield made
    made.thread.close()


async def test_each_seat_gets_the_keys_of_its_own_shards(bench: Bench) -> None:
    await bench.add()
    parts = [bench.datasets.part(bench.job(), SeatIndex(seat)) for seat in (0, 1)]
    assert [part.shards for part in parts] == [(0, 2, 4), (1, 3)]
    for part in parts:
        assert part.keys == tuple(shard_key(bench.key, index) for index in part.shards)
        assert bench.key not in part.keys
    assert bench.datasets.part(bench.job(), SeatIndex(0)) is parts[0], "orders that are the same are not sent again"
    assert bench.datasets.part(collecting("a"), SeatIndex(0)) is None


async def test_it_is_there_for_jobs_of_its_organisation_alone(bench: Bench) -> None:
    await bench.add()
    assert bench.datasets.known("acme") == {bench.told.reference: Known(64, 10, 5)}
    assert bench.datasets.known("others") == {}
    with pytest.raises(NotFoundError, match=r"no data set sealed:ward@.* for jobs of others"):
        bench.datasets.part(bench.job("others"), SeatIndex(0))


async def test_it_is_added_once_and_by_its_owners_word(bench: Bench) -> None:
    await bench.add()
    await bench.add()
    assert len(bench.datasets.all()) == 1
    with pytest.raises(AlreadyExistsError, match="known for acme already"):
        await bench.add("others")
    with pytest.raises(AlreadyExistsError):
        await bench.datasets.add(bench.manifest, bytes(32), "acme", ANN)
    with pytest.raises(InvalidArgumentError, match="32 bytes"):
        await bench.datasets.add(bench.manifest, b"short", "acme", ANN)
    unsigned = replace(bench.told.envelope, signatures=()).to_json()
    with pytest.raises(ForbiddenError, match="not signed"):
        await bench.datasets.add(unsigned, bench.key.key, "acme", ANN)


async def test_what_was_stored_for_somebody_who_gave_up_is_known_when_it_is_added_again(bench: Bench) -> None:
    await bench.add()
    # Stored, and then nobody was there to hear of it.
    bench.datasets = bench.again()
    with pytest.raises(AlreadyExistsError, match="another key"):
        await bench.datasets.add(bench.manifest, bytes(32), "acme", ANN)
    bench.datasets = bench.again()
    with pytest.raises(AlreadyExistsError, match="known for acme already"):
        await bench.add("others")
    await bench.add()
    assert list(bench.datasets.known("acme")) == [bench.told.reference]
    assert bench.datasets.known("others") == {}


async def test_a_manifest_that_cannot_be_read_hinders_nothing_else(bench: Bench) -> None:
    await bench.add()
    (stored,) = bench.store.datasets()
    bench.store.add_dataset(replace(stored, digest="ab" * 32, manifest="damaged"), bench.fence)
    again = bench.again()
    await again.load()
    assert list(again.known("acme")) == [bench.told.reference]
    _, count = await bench.keys.rotate_kek("because", bench.fence)
    assert count == 1


async def test_its_key_rests_wrapped_and_moves_with_the_key_encryption_key(bench: Bench) -> None:
    await bench.add()
    (stored,) = bench.store.datasets()
    assert bench.key.key not in stored.key.wrapped
    before = bench.ring.current
    made, count = await bench.keys.rotate_kek("because", bench.fence)
    assert (count, bench.ring.ids) == (1, (made,))
    assert made != before
    again = bench.again()
    await again.load()
    assert again.part(bench.job(), SeatIndex(1)).keys == (shard_key(bench.key, 1), shard_key(bench.key, 3))


async def test_a_key_encryption_key_stays_while_something_is_about_to_rest_under_it(bench: Bench) -> None:
    wrapped, held = asyncio.Event(), asyncio.Event()
    rest = bench.keys.rest

    async def slow(*given):
        resting = await rest(*given)
        wrapped.set()
        await held.wait()
        return resting

    bench.keys.rest = slow
    adding = asyncio.create_task(bench.add())
    await wrapped.wait()
    await bench.keys.rotate_kek("because", bench.fence)
    held.set()
    await adding
    again = bench.again()
    await again.load()
    assert again.part(bench.job(), SeatIndex(0)) is not None


async def test_without_its_key_encryption_key_a_job_fails_and_says_why(bench: Bench) -> None:
    await bench.add()
    again = bench.again("another.json")
    await again.load()
    with pytest.raises(NotFoundError, match="key of data set sealed:ward@"):
        again.part(bench.job(), SeatIndex(0))


async def test_once_removed_it_is_gone(bench: Bench) -> None:
    await bench.add()
    assert (await bench.datasets.remove(bench.told.digest)).digest == bench.told.digest
    assert bench.store.datasets() == []
    with pytest.raises(NotFoundError):
        await bench.datasets.remove(bench.told.digest)
