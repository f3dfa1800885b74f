"""Error feedback keeps its books through lost uploads, crashes and skipped rounds: no mass is lost or counted twice."""

from __future__ import annotations

import asyncio
import os
import resource

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import chunk_count, chunk_ranges
from services.worker.domain import Carry, carry_of
from services.worker.failures import FeedbackLostError
from services.worker.residuals import Feedback, Kept, ResidualStore, kept_header, sweep, sweep_daily
from tests.fakes import ManualClock

JOB = JobId("job-1")
CHUNK = 5000
ELEMENTS = 12_345
KEY = DataKey(KeyId("k"), 1, bytes(range(32)))


def header(number: int, seat: int = 0, base: str = "", key: DataKey = KEY) -> ObjectHeader:
    return ObjectHeader(
        kind=ObjectKind.UPDATE,
        network="cortex",
        job_id=JOB,
        round=RoundNumber(number),
        attempt=1,
        fence=1,
        sender=NodeName("w1"),
        seat=SeatIndex(seat),
        key_id=key.key_id,
        codec="topk",
        codec_options="",
        chunk_elements=CHUNK,
        elements=ELEMENTS,
        counters=0,
        chunks=chunk_count(ELEMENTS, 0, CHUNK),
        manifest_sha256=Sha256Hex("m" * 64),
        base_sha256=base or f"version {number - 1}",
    ).fresh()


class Worker:
    """Sends one update a round; every send begins with a new process's memory."""

    def __init__(self, root, codec: str) -> None:
        self.root = root
        self.codec = WeightCompressor.create(codec, {"stochastic": True} if codec == "int4" else {})

    def feedback(
        self, number: int, included: int | None, *, seat=0, base="", base_seats=(), key=KEY, known=()
    ) -> Feedback:
        resting = kept_header(header(number, seat, base, key))
        blob = f"{number}-{resting.object_id.hex()[:8]}.blob"
        kept = Kept(number, self.codec.codec, self.codec.options_json, (7, number, seat), resting, blob)
        store = ResidualStore(self.root, JOB)
        return Feedback(
            store, kept, included, frozenset(map(SeatIndex, base_seats)), EncryptionManager(*(known or (key,)))
        )

    def send(self, number: int, delta, included: int | None, *, chunks: int | None = None, twice: int = 0, **order):
        """The update as the receiver decodes it; broken off after `chunks`, chunk `twice` sent a second time."""
        feedback = self.feedback(number, included, **order)
        sent = np.zeros(ELEMENTS, np.float32)
        parts = chunk_ranges(ELEMENTS, 0, CHUNK)[:chunks]
        try:
            for part in [*parts[: twice + 1], *parts[twice:]] if parts else []:
                values = delta[part.start : part.stop].copy()
                feedback.apply(part, values)
                payload = self.codec.encode(values, seed=rounding_seed(*feedback.kept.seed, part.index))
                decoded = self.codec.decode(payload, part.elements)
                before = sent[part.start : part.stop]
                assert not before.any() or np.array_equal(before, decoded), "a chunk sent again is the same chunk"
                before[:] = decoded
        finally:
            feedback.close()
        return sent


def carried(worker: Worker, number: int, included: int | None, **order):
    """What the next update would add to a change of zero, before it is quantised."""
    exact = Worker(worker.root, "none")
    return exact.send(number, np.zeros(ELEMENTS, np.float32), included, **order)


@pytest.mark.parametrize("codec", ["topk", "int4", "int8"])
@settings(max_examples=15)
@given(fates=st.lists(st.sampled_from(["counts", "lost", "crash", "skipped", "again"]), min_size=1, max_size=7))
def test_what_was_counted_and_what_is_carried_add_up_to_everything(tmp_path_factory, codec, fates):
    """One worker in one seat; what lost updates changed is given up when they grow stale: a round is skipped."""
    worker = Worker(tmp_path_factory.mktemp("w"), codec)
    random = np.random.default_rng(1)
    counted = np.zeros(ELEMENTS)
    total = np.zeros(ELEMENTS)
    included: int | None = None
    base_seats: tuple[int, ...] = ()
    lost = np.zeros(ELEMENTS)
    for number, fate in enumerate(fates, start=1):
        delta = random.standard_normal(ELEMENTS).astype(np.float32)
        if fate == "skipped":
            total -= lost
            lost[:] = 0
            base_seats = ()
            continue
        order = {"base_seats": base_seats}
        if fate == "crash":
            worker.send(number, delta, included, chunks=2, **order)
        sent = worker.send(number, delta, included, twice=1, **order)
        if fate == "again":
            assert np.array_equal(worker.send(number, delta, included, **order), sent), "the same is the same"
        total += delta
        counted += sent if fate != "lost" else 0
        lost = lost + delta if fate == "lost" else np.zeros(ELEMENTS)
        included = number if fate != "lost" else included
        base_seats = (0,) if fate != "lost" else ()
    rest = carried(worker, len(fates) + 1, included, base_seats=base_seats)
    np.testing.assert_allclose(counted + rest, total, rtol=0, atol=2e-4)


SEATS, WORKERS = 2, 3
EVENTS = st.lists(
    st.tuples(
        st.integers(0, WORKERS - 1),
        st.integers(0, SEATS - 1),
        st.sampled_from(["accepted", "accepted", "late", "cut"]),
    ),
    max_size=5,
)


@pytest.mark.parametrize("codec", ["none", "topk"])
@settings(max_examples=60)
# Two workers were late for seat 0; they get different seats in the next round.
@example(
    attempts=[
        (True, [(0, 0, "late"), (1, 0, "late"), (2, 1, "accepted")]),
        (True, [(0, 0, "accepted"), (1, 1, "accepted")]),
    ]
)
# A worker loses seat 0 to another and gets seat 1 in the same round.
@example(attempts=[(True, [(0, 0, "late"), (0, 1, "accepted"), (1, 0, "accepted")]), (True, [])])
@given(attempts=st.lists(st.tuples(st.booleans(), EVENTS), min_size=2, max_size=6))
def test_no_seat_of_a_round_counts_twice_whoever_fills_it(tmp_path_factory, codec, attempts):
    """Seats change hands within and between rounds. Seat s of round k is coordinate k * SEATS + s: at most 1."""
    root = tmp_path_factory.mktemp("w")
    workers = [Worker(root / str(index), codec) for index in range(WORKERS)]
    counted = np.zeros(ELEMENTS)
    included: list[int | None] = [None] * WORKERS
    base_seats: tuple[int, ...] = ()
    number = 1
    for is_sealed, events in attempts:
        accepted: dict[int, tuple[int, np.ndarray]] = {}
        for who, seat, fate in events:
            if any(who == owner for owner, _ in accepted.values()):
                continue
            delta = np.zeros(ELEMENTS, np.float32)
            delta[number * SEATS + seat] = 1
            order = {"seat": seat, "base_seats": base_seats}
            sent = workers[who].send(number, delta, included[who], chunks=1 if fate == "cut" else None, **order)
            # A seat that is filled is answered with the receipt of whoever filled it.
            if fate == "accepted" and seat not in accepted:
                accepted[seat] = (who, sent)
        if is_sealed and accepted:
            base_seats = tuple(accepted)
            for who, sent in accepted.values():
                counted += sent
                included[who] = number
            number += 1
        assert counted.max(initial=0) <= 1 + 1e-3
        assert counted.min(initial=0) >= -1e-3


@pytest.mark.parametrize(
    ("due", "expected"),
    [
        ({"number": 4, "included": None, "seat": 2}, Carry.REPEAT),
        ({"number": 4, "included": None, "seat": 3}, Carry.NOTHING),
        ({"number": 4, "included": None, "seat": 2, "base": "another"}, Carry.NOTHING),
        ({"number": 5, "included": 4, "seat": 0, "base_seats": {0, 2}}, Carry.ERROR),
        ({"number": 9, "included": 4, "seat": 0, "base_seats": {0}}, Carry.ERROR),
        ({"number": 5, "included": 3, "seat": 2, "base_seats": {0}}, Carry.WHOLE),
        ({"number": 5, "included": 3, "seat": 2, "base_seats": {0, 2}}, Carry.NOTHING),
        ({"number": 5, "included": 3, "seat": 0, "base_seats": {0}}, Carry.NOTHING),
        ({"number": 6, "included": 3, "seat": 2, "base_seats": {0}}, Carry.NOTHING),
    ],
)
def test_what_becomes_of_the_update_of_round_4_seat_2(due, expected):
    order = {"seat": 0, "base": "", "base_seats": set()} | due
    seats = frozenset(map(SeatIndex, order["base_seats"]))
    assert (
        carry_of(header(4, 2), header(order["number"], order["seat"], order["base"]), due["included"], seats)
        is expected
    )


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (3, {"seat": 1}),  # the seat changed hands before the next round
        (3, {"base_seats": (0,)}),  # another worker filled it
        (4, {}),  # a round was skipped
        (2, {"seat": 1}),  # the same round again, in another seat
        (2, {"base": "another"}),  # the same round again, from another version
    ],
)
def test_a_lost_update_that_is_given_up_does_not_take_the_error_of_the_one_that_counted_with_it(
    tmp_path, number, order
):
    worker = Worker(tmp_path, "topk")
    random = np.random.default_rng(0)
    counted, lost = (random.standard_normal(ELEMENTS).astype(np.float32) for _ in range(2))
    left_out = counted - worker.send(1, counted, None)
    worker.send(2, lost, 1, base_seats=(0,))
    np.testing.assert_allclose(carried(worker, number, 1, **order), left_out, rtol=0, atol=1e-6)


def test_an_error_that_has_counted_is_not_carried_again(tmp_path):
    """The update that carried it came into a version: what is left of both is its own error."""
    worker = Worker(tmp_path, "topk")
    delta = np.random.default_rng(0).standard_normal(ELEMENTS).astype(np.float32)
    first = worker.send(1, delta, None)
    second = worker.send(2, delta, 1, base_seats=(0,))
    worker.send(3, delta, 2, base_seats=(0,))
    rest = carried(worker, 4, 2, seat=1)
    np.testing.assert_allclose(first + second + rest, 2 * delta, rtol=0, atol=1e-5)
    assert len(list((tmp_path / JOB).glob("*.blob"))) <= 2, "no more is kept than can be needed"


def test_an_update_under_the_key_before_is_read_while_that_is_known(tmp_path):
    worker = Worker(tmp_path, "topk")
    delta = np.random.default_rng(0).standard_normal(ELEMENTS).astype(np.float32)
    sent = worker.send(1, delta, None)
    new = DataKey(KeyId("k2"), 2, bytes(32))
    rest = carried(worker, 2, 1, key=new, known=(KEY, new))
    np.testing.assert_allclose(sent + rest, delta, rtol=0, atol=1e-6)


def test_an_upload_answered_with_the_receipt_of_another_leaves_nothing_to_carry(tmp_path):
    """The seat was filled meanwhile: not a chunk was asked for, or all of them came too late."""
    worker = Worker(tmp_path, "none")
    ones = np.ones(ELEMENTS, np.float32)
    worker.send(1, ones, None)
    worker.send(2, 8 * ones, 1, chunks=0, base_seats=(0,))
    assert not carried(worker, 3, 1, base_seats=(0,)).any()
    worker.send(4, 8 * ones, 1)
    assert not carried(worker, 5, 1, base_seats=(0,)).any()


def test_without_an_earlier_update_nothing_is_added(tmp_path):
    delta = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)
    assert np.array_equal(Worker(tmp_path, "none").send(1, delta, None), delta)


def test_a_damaged_folder_costs_the_residual_and_not_the_round(tmp_path):
    worker = Worker(tmp_path, "int8")
    delta = np.ones(ELEMENTS, np.float32)
    worker.send(1, delta, None)
    (tmp_path / JOB / "kept.json").write_text("{")
    assert np.allclose(worker.send(2, delta, 1), delta, atol=0.01)
    assert len(list((tmp_path / JOB).glob("*.blob"))) == 1, "what does not count is removed"
    for blob in (tmp_path / JOB).glob("*.blob"):
        blob.unlink()
    assert np.allclose(worker.send(3, delta, 2), delta, atol=0.01)


def test_nothing_readable_rests_on_the_disk(tmp_path):
    worker = Worker(tmp_path, "int8")
    worker.send(1, np.full(ELEMENTS, 1234.5, np.float32), None)
    canary = np.full(4, 1234.5, np.float32).tobytes()
    for path in (tmp_path / JOB).iterdir():
        assert canary not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0


def test_old_folders_are_swept(tmp_path):
    worker = Worker(tmp_path, "int8")
    worker.send(1, np.ones(ELEMENTS, np.float32), None)
    now_s = (tmp_path / JOB).stat().st_mtime
    sweep(tmp_path, now_s + 3600)
    assert (tmp_path / JOB).exists()
    sweep(tmp_path, now_s + 30 * 24 * 3600)
    assert not (tmp_path / JOB).exists()
    sweep(tmp_path / "none", now_s)


@pytest.mark.parametrize("damage", ["changed", "cut"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_update_costs_the_residual_and_not_the_round(tmp_path, damage, number):
    """Sent again (round 1), or carried into the next (round 2)."""
    worker = Worker(tmp_path, "int8")
    delta = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)
    worker.send(1, delta, None)
    (blob,) = (tmp_path / JOB).glob("*.blob")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content if damage == "changed" else content[: 4 * CHUNK])
    other = 3 * delta
    with pytest.raises(FeedbackLostError, match="round 1"):
        worker.send(number, other, None)
    assert np.allclose(worker.send(number, other, None), other, atol=0.05), "made anew, nothing of the damaged one"
    assert np.array_equal(worker.send(number, delta, None), worker.send(number, other, None)), "it is kept itself"


def test_an_update_under_a_key_that_is_gone_does_not_count(tmp_path):
    worker = Worker(tmp_path, "none")
    delta = np.ones(ELEMENTS, np.float32)
    worker.send(1, delta, None)
    new = DataKey(KeyId("k2"), 2, bytes(32))
    with pytest.raises(FeedbackLostError):
        worker.send(2, delta, None, key=new)
    assert np.array_equal(worker.send(2, delta, None, key=new), delta)


def test_an_update_in_other_chunks_does_not_count(tmp_path, monkeypatch):
    worker = Worker(tmp_path, "none")
    delta = np.ones(ELEMENTS, np.float32)
    worker.send(1, delta, None)
    monkeypatch.setitem(globals(), "CHUNK", 4000)
    assert np.array_equal(worker.send(2, delta, None), delta)


@pytest.mark.parametrize("room", [4 * CHUNK + 100, 4 * ELEMENTS + 5])
def test_an_update_that_finds_no_room_is_not_half_kept(tmp_path, room):
    """A write that is cut short at a file size limit is neither taken for whole nor silently left so."""
    worker = Worker(tmp_path, "none")
    delta = np.ones(ELEMENTS, np.float32)
    worker.send(1, delta, None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(FeedbackLostError, match="round 2"):
            worker.send(2, delta, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list((tmp_path / JOB).glob("*.blob"))) == 1
    assert np.array_equal(carried(worker, 2, None), delta), "what was kept before is still there"


def test_a_chunk_after_the_end_is_refused(tmp_path):
    """A chunk in hand on a thread when the upload is cancelled must not touch files that are closed."""
    feedback = Worker(tmp_path, "none").feedback(1, None)
    feedback.close()
    with pytest.raises(FeedbackLostError, match="given up"):
        feedback.apply(chunk_ranges(ELEMENTS, 0, CHUNK)[0], np.ones(CHUNK, np.float32))


async def test_old_folders_are_swept_every_day(tmp_path):
    worker, clock = Worker(tmp_path, "none"), ManualClock()
    worker.send(1, np.ones(ELEMENTS, np.float32), None)
    os.utime(tmp_path / JOB, (clock.wall_s(), clock.wall_s()))
    sweeping = asyncio.create_task(sweep_daily(tmp_path, clock))
    for day in range(9):
        await clock.until_sleeping()
        assert (tmp_path / JOB).exists() == (day < 8)
        await clock.advance(24 * 3600)
    sweeping.cancel()
