"""New data keys for rounds that are opened, while whoever can wrap them is away or slow."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from cortex_common.errors import CortexError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.ids import JobId, NodeName, RoundNumber
from cortex_common.security.keyring import FileKeyring
from services.coordinator.domain.advance import Verdict
from services.coordinator.domain.epochs import with_holders
from services.coordinator.domain.job import Job, Note, Stage
from services.coordinator.domain.seen import Rules, Seen
from services.coordinator.rekeying import Rekeying
from services.coordinator.tracked import Tracked
from tests.fakes import settle
from tests.unit.coordinator.jobs import collecting
from tests.unit.coordinator.test_job_keys import Bench

RULES = Rules(data_key_age_s=100.0, data_key_rounds=10)


class Holder(FileKeyring):
    """Wraps nothing while there is an `error`, and only once it is `there`."""

    error: CortexError | None = None
    asked = 0
    there = threading.Event()

    def wrap(self, secret, context):
        self.asked += 1
        if self.error is not None:
            raise self.error
        assert self.there.wait(20)
        return super().wrap(secret, context)


@pytest.fixture
async def bench(tmp_path):
    """With job j1, whose only epoch began with its submission."""
    made = Bench(tmp_path)
    await made.submit(job())
    made.ring.__class__ = Holder
    made.ring.there = threading.Event()
    made.ring.there.set()
    yield made
    made.ring.there.set()
    made.thread.close()


def job(number=1, *names):
    return replace(collecting(*(names or ("a", "b"))), round=RoundNumber(number))


def opened(number=1, before=None, **changes):
    """A job that gathers, and the one step that opens its round."""
    after = replace(before or job(), stage=Stage.COLLECTING, round=number, **changes)
    gathering = replace(after, stage=Stage.GATHERING, cohort=())
    return gathering, [Verdict(after, (Note("round_opened", number, ""),))]


def names(keyed):
    return [note.name for step in keyed.steps for note in step.notes]


async def test_a_round_keeps_its_key_while_that_is_good(bench):
    rekeying = Rekeying(bench.keys, bench.clock, RULES)
    keyed = await rekeying.keyed(*opened())
    assert (names(keyed), keyed.key, keyed.waits_for) == (["round_opened"], None, None)
    assert keyed.steps[0].job.key_holders == ("aggregator agg", "worker a", "worker b")
    assert bench.ring.asked == 0


async def test_only_a_round_that_is_opened_gets_a_new_key(bench):
    rekeying = Rekeying(bench.keys, bench.clock, RULES)
    await bench.clock.advance(100)
    collecting_now = job()
    for after in (replace(collecting_now, pausing=True), replace(collecting_now, stage=Stage.GATHERING, attempt=2)):
        assert (await rekeying.keyed(collecting_now, [Verdict(after)])).key is None
    assert (await rekeying.keyed(*opened())).key.stored.reason == "100 s old"


@pytest.mark.parametrize("error", [UnavailableError, NotFoundError, PreconditionError])
async def test_a_key_that_is_only_old_goes_on_until_a_new_one_can_be_wrapped(bench, error):
    rekeying = Rekeying(bench.keys, bench.clock, RULES)
    bench.ring.error = error("token 'x' does not answer")
    await bench.clock.advance(100)
    keyed = await rekeying.keyed(*opened(1))
    assert (names(keyed), keyed.key, keyed.waits_for) == (["round_opened", "data_key_kept"], None, None)
    assert keyed.steps[-1].notes[-1].message == (
        "epoch 1 goes on, though 100 s old; the key-encryption key: token 'x' does not answer"
    )
    assert keyed.steps[-1].job.key_holders == ("aggregator agg", "worker a", "worker b")

    # Said once an epoch, and rounds that follow closely do not each ask.
    assert names(await rekeying.keyed(*opened(2))) == ["round_opened"]
    assert bench.ring.asked == 1
    await bench.clock.advance(1)
    assert names(await rekeying.keyed(*opened(3))) == ["round_opened"]
    assert bench.ring.asked == 2

    bench.ring.error = None
    await bench.clock.advance(5)
    keyed = await rekeying.keyed(*opened(4))
    assert names(keyed) == ["round_opened", "data_key_rotated"]
    assert (keyed.key.stored.epoch, keyed.key.stored.from_round, keyed.key.stored.reason) == (2, 4, "106 s old")


@pytest.mark.parametrize(
    ("after", "why"),
    [({"rekey": "asked for by ann"}, "asked for by ann"), ({"seats": (NodeName("a"), None)}, "worker b left")],
)
async def test_a_round_that_must_have_a_new_key_is_not_opened_without_it_and_what_was_before_is_stored(
    bench, after, why
):
    rekeying = Rekeying(bench.keys, bench.clock, RULES)
    held = with_holders(job())
    gathering, steps = opened(2, held, **after)
    finished = Verdict(gathering, (Note("round_closed", 1, ""),))
    bench.ring.error = UnavailableError("token 'x' does not answer")
    keyed = await rekeying.keyed(replace(held, stage=Stage.SEALED), [finished, *steps])
    assert names(keyed) == ["round_closed"]
    assert keyed.steps[-1].job.stage is Stage.GATHERING
    assert keyed.waits_for == (f"the key-encryption key: token 'x' does not answer; a new data key is needed: {why}")
    keyed = await rekeying.keyed(keyed.steps[-1].job, steps)
    assert (keyed.steps, keyed.key) == ((), None)
    assert keyed.waits_for is not None

    bench.ring.error = None
    await bench.clock.advance(5)
    keyed = await rekeying.keyed(gathering, steps)
    assert names(keyed) == ["round_opened", "data_key_rotated"]
    assert (keyed.steps[-1].job.rekey, keyed.waits_for) == ("", None)
    opened_job = keyed.steps[-1].job
    assert opened_job.key_holders == ("aggregator agg", *(f"worker {name}" for name in opened_job.seats if name))


async def test_who_does_not_answer_at_all_holds_up_one_round_once_and_the_key_that_comes_late_is_used(bench):
    other = await bench.submit(replace(job(), id=JobId("j2")))
    asked = bench.ring.asked
    rekeying = Rekeying(bench.keys, bench.clock, RULES, patience_s=0.05)
    bench.ring.there.clear()
    await bench.clock.advance(100)
    for number in (1, 2):
        keyed = await rekeying.keyed(*opened(number))
        assert (keyed.key, keyed.waits_for) == (None, None)
    waits = await rekeying.keyed(*opened(1, other, rekey="asked for by ann"))
    assert "does not answer" in str(waits.waits_for)
    assert bench.ring.asked == asked + 1, "one question at a time"

    task = rekeying._asked[job().id]
    bench.ring.there.set()
    await task
    keyed = await rekeying.keyed(*opened(3))
    assert (keyed.key.stored.epoch, keyed.key.open.epoch.from_round, keyed.key.stored.from_round) == (2, 3, 3)
    assert bench.ring.asked == asked + 1
    bench.store.commit(job(), job(), [], bench.fence, 1.0, [keyed.key.stored])
    bench.keys.begin(job().id, keyed.key)
    later = bench.again()
    await later.load(job().id)
    assert later.of_round(job(3)) == bench.keys.of_round(job(3))


async def test_a_key_that_comes_after_its_job_has_ended_keeps_no_key_encryption_key(bench):
    rekeying = Rekeying(bench.keys, bench.clock, RULES, patience_s=0.05)
    bench.ring.there.clear()
    await bench.clock.advance(100)
    await rekeying.keyed(*opened())
    task = rekeying._asked[job().id]
    rekeying.forget(job().id)
    bench.keys.forget(job().id)
    bench.ring.there.set()
    await settle()
    assert task.cancelled()
    made, _ = await bench.keys.rotate_kek("asked for by ann", bench.fence)
    assert bench.ring.ids == (made,)


def test_time_in_which_a_round_waits_for_a_key_is_not_spent_on_waiting_for_workers():
    gathering: Job = replace(job(), stage=Stage.GATHERING)
    tracked = Tracked(gathering, Seen(since_s=1.0))
    tracked.wait_for("the key-encryption key", 500.0)
    assert (tracked.seen.trouble, tracked.seen.since_s) == ("the key-encryption key", 500.0)
    tracked.wait_for_others()
    assert (tracked.seen.trouble, tracked.seen.since_s) == (None, 500.0)
