"""JobKeys: data keys by epoch, wrapped under key-encryption keys that are replaced."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cortex_common.errors import CorruptError, NotFoundError, UnavailableError
from cortex_common.security.keyring import FileKeyring, RestingKey
from services.coordinator.domain.job import Note, Stage
from services.coordinator.keys import JobKeys
from services.coordinator.memory_store import MemoryStore
from services.coordinator.store_thread import StoreThread
from tests.fakes import ManualClock
from tests.unit.coordinator.jobs import collecting, new_job, version

NOTE = Note("job_submitted", 0, "by ann")


class Bench:
    """A store, a keyring, and whatever takes them up again."""

    def __init__(self, folder):
        self.clock = ManualClock()
        self.ring = FileKeyring(folder / "keyring.json", self.clock)
        self.store = MemoryStore()
        self.fence = self.store.acquire("me", 1.0)
        self.thread = StoreThread(self.store)
        self.records = []
        self.keys = self.again()

    def again(self):
        return JobKeys("net", self.thread, self.ring, self.clock, lambda *record: self.records.append(record))

    async def submit(self, job=None):
        job = job or new_job()
        key = await self.keys.first(job.id)
        self.store.insert(job, None, NOTE, self.fence, 1.0, [key.stored])
        self.keys.begin(job.id, key)
        return job

    async def rotate(self, job, reason="because"):
        key = await self.keys.next(job, reason)
        self.store.commit(job, job, [], self.fence, 1.0, [key.stored])
        self.keys.begin(job.id, key)


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.thread.close()


async def test_a_key_rests_wrapped_and_is_the_same_after_a_restart(bench):
    job = await bench.submit()
    keys = bench.keys.of_round(job)
    (stored,) = bench.store.keys(job.id)
    assert keys.current.key not in stored.resting.wrapped
    later = bench.again()
    await later.load(job.id)
    assert later.of_round(job) == keys
    assert later.newest(job.id).number == 1


async def test_a_row_that_took_anothers_place_does_not_open(bench):
    one, two = await bench.submit(), await bench.submit(replace(new_job(), id="j2"))
    bench.store._keys[one.id][1] = replace(bench.store.keys(two.id)[0], key_id=bench.store.keys(one.id)[0].key_id)
    later = bench.again()
    await later.load(one.id)
    with pytest.raises(CorruptError, match=f"data key of job {one.id}"):
        later.of_round(one)


async def test_a_round_gets_its_epochs_key_and_those_it_must_read_with(bench):
    job = replace(collecting("a"), round=0, attempt=1)
    await bench.submit(job)
    for number in (3, 5):
        await bench.rotate(replace(job, round=number))
    at = replace(job, round=4, version=version(3))
    assert [key.epoch for key in (bench.keys.of_round(at, 2).current, *bench.keys.of_round(at, 2).older)] == [2, 1]
    assert bench.keys.of_round(replace(job, round=6), 5).older == ()
    with pytest.raises(NotFoundError, match="no data key"):
        bench.keys.of_round(replace(job, id="other"))


async def test_what_is_not_needed_is_erased_everywhere(bench):
    job = replace(collecting("a"), round=0, attempt=1)
    await bench.submit(job)
    for number in (3, 5):
        await bench.rotate(replace(job, round=number))
    now = replace(job, round=6, version=version(5), included={"a": 5})
    await bench.keys.erase(now, {5}, bench.fence)
    assert [key.is_erased for key in bench.store.keys(job.id)] == [True, True, False]
    assert [key.epoch for key in await bench.keys.all(job.id)] == [3]
    later = bench.again()
    await later.load(job.id)
    for keys in (bench.keys, later):
        assert keys.of_round(now, 0).older == ()
        with pytest.raises(NotFoundError, match="erased"):
            keys.of_round(replace(now, round=1))
    assert bench.records[-1][:2] == ("data key erased", f"job_id={job.id} epoch=1,2")


async def test_a_key_that_is_begun_while_others_are_erased_stays(bench):
    job = replace(collecting("a"), round=0, attempt=1)
    await bench.submit(job)
    await bench.rotate(replace(job, round=3))
    now, then = replace(job, round=6, version=version(5), included={"a": 5}), replace(job, round=7)
    third = await bench.keys.next(then, "because")
    storing = asyncio.create_task(
        bench.thread.call(lambda store: store.commit(job, job, [], bench.fence, 1.0, [third.stored]))
    )
    await asyncio.sleep(0)
    erasing = asyncio.create_task(bench.keys.erase(now, {5}, bench.fence))
    await storing
    bench.keys.begin(job.id, third)
    await erasing
    assert [key.is_erased for key in bench.store.keys(job.id)] == [True, False, False]
    assert bench.keys.of_round(then).current.epoch == 3


async def test_a_new_key_encryption_key_takes_all_data_keys_and_the_old_one_is_destroyed(bench):
    jobs = [await bench.submit(replace(new_job(), id=f"j{number}")) for number in range(5)]
    ended = replace(jobs[0], stage=Stage.COMPLETED)
    bench.store.commit(jobs[0], ended, [], bench.fence, 1.0)
    before = {job.id: bench.keys.of_round(job).current for job in jobs}
    old = bench.ring.current
    made, count = await bench.keys.rotate_kek("asked for by ann", bench.fence)
    assert (count, bench.ring.ids) == (5, (made,))
    assert bench.store.kek_ids() == {made}
    later = bench.again()
    for job in jobs:
        await later.load(job.id)
        assert later.of_round(job).current == before[job.id]
    assert ("key-encryption key made", f"kek_id={made}", "asked for by ann") in bench.records
    assert ("key-encryption key erased", f"kek_id={old}", "nothing rests under it") in bench.records


async def test_a_rotation_that_was_broken_off_is_finished_at_the_next_start(bench):
    job = await bench.submit()
    old, made = bench.ring.current, bench.ring.rotate()
    assert {old} == bench.store.kek_ids()
    assert await bench.again().rewrap(bench.fence) == 1
    assert bench.store.kek_ids() == {made}
    assert bench.ring.ids == (made,)
    await bench.keys.load(job.id)


async def test_a_key_that_is_just_being_stored_keeps_its_key_encryption_key(bench):
    """Otherwise a job that is submitted during the rotation would have a key that nobody can open."""
    new = await bench.keys.first("late")
    old = bench.ring.current
    made, _ = await bench.keys.rotate_kek("asked for by ann", bench.fence)
    assert bench.ring.ids == (old, made)
    job = replace(new_job(), id="late")
    bench.store.insert(job, None, NOTE, bench.fence, 1.0, [new.stored])
    bench.keys.begin("late", new)
    assert await bench.keys.rewrap(bench.fence) == 1
    assert bench.ring.ids == (made,)


async def test_what_does_not_open_is_left_alone_and_so_is_what_it_rests_under(bench):
    good, bad = await bench.submit(), await bench.submit(replace(new_job(), id="bad"))
    old = bench.ring.current
    spoilt = replace(bench.store.keys(bad.id)[0], resting=RestingKey(old, bytes(60)))
    bench.store._keys[bad.id][1] = spoilt
    made, count = await bench.keys.rotate_kek("asked for by ann", bench.fence)
    assert count == 1
    assert bench.store.keys(bad.id) == [spoilt]
    assert bench.store.keys(good.id)[0].resting.kek_id == made
    assert bench.ring.ids == (old, made)


async def test_a_key_encryption_key_is_replaced_when_it_is_old(bench):
    job = await bench.submit()
    first = bench.ring.current
    keeping = asyncio.create_task(bench.keys.keep_young(100.0, bench.fence))
    for _ in range(3):
        before = bench.ring.current
        for _ in range(4):
            await bench.clock.until_sleeping()
            assert bench.ring.current == before
            await bench.clock.advance(25.1)
        await bench.clock.until_sleeping()
        assert bench.ring.current != before
    keeping.cancel()
    await asyncio.wait((keeping,))
    assert first not in bench.ring.ids
    await bench.again().load(job.id)


@pytest.mark.parametrize("error", [UnavailableError, NotFoundError])
async def test_a_holder_of_keys_that_is_away_for_a_while_ends_nothing(bench, error):
    class Blinking(FileKeyring):
        away = True

        @property
        def current(self):
            if self.away:
                raise error("token 'x' does not answer")
            return super().current

    first = bench.ring.current
    bench.ring.__class__ = Blinking
    keeping = asyncio.create_task(bench.keys.keep_young(100.0, bench.fence))
    for _ in range(5):
        await until_asleep(bench.clock, keeping)
        await bench.clock.advance(25.0)
    bench.ring.away = False
    await until_asleep(bench.clock, keeping)
    await bench.clock.advance(25.0)
    await until_asleep(bench.clock, keeping)
    assert bench.ring.current != first
    keeping.cancel()
    await asyncio.wait((keeping,))


async def until_asleep(clock, task):
    """Return once a task sleeps; raise what it ended with, if it did."""
    asleep = asyncio.create_task(clock.until_sleeping())
    await asyncio.wait((asleep, task), return_when=asyncio.FIRST_COMPLETED)
    asleep.cancel()
    if task.done():
        task.result()


async def test_a_holder_of_keys_that_is_away_makes_no_job_without_a_key(bench):
    class Away(FileKeyring):
        def wrap(self, secret, context):
            raise UnavailableError("token 'x' does not answer")

    bench.ring.__class__ = Away
    with pytest.raises(UnavailableError):
        await bench.keys.first("j")
