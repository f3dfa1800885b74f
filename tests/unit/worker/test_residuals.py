"""Error feedback keeps its books through lost uploads, crashes and skipped rounds: no mass is lost or counted twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor, rounding_seed
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import chunk_count, chunk_ranges
from services.worker.residuals import Feedback, Kept, ResidualStore, kept_header, sweep

JOB = JobId("job-1")
CHUNK = 5000
ELEMENTS = 12_345
KEY = DataKey(KeyId("k"), 1, bytes(range(32)))


def header(number: int) -> ObjectHeader:
    return ObjectHeader(
        kind=ObjectKind.UPDATE,
        network="cortex",
        job_id=JOB,
        round=RoundNumber(number),
        attempt=1,
        fence=1,
        sender=NodeName("w1"),
        seat=SeatIndex(0),
        key_id=KEY.key_id,
        codec="topk",
        codec_options="",
        chunk_elements=CHUNK,
        elements=ELEMENTS,
        counters=0,
        chunks=chunk_count(ELEMENTS, 0, CHUNK),
        manifest_sha256=Sha256Hex("m" * 64),
    ).fresh()


class Worker:
    """Sends one update a round; every send begins with a new process's memory."""

    def __init__(self, root, codec: str) -> None:
        self._root = root
        self.codec = WeightCompressor.create(codec, {"stochastic": True} if codec == "int4" else {})

    def send(self, number: int, delta, included: int | None, *, chunks: int | None = None, twice: int = 0):
        """The update as the receiver decodes it; broken off after `chunks`, chunk `twice` sent a second time."""
        resting = kept_header(header(number))
        seed = (7, number, 0)
        blob = f"{number}-{resting.object_id.hex()[:8]}.blob"
        kept = Kept(number, self.codec.codec, self.codec.options_json, seed, resting, blob)
        feedback = Feedback(ResidualStore(self._root, JOB), kept, included, EncryptionManager(KEY))
        sent = np.zeros(ELEMENTS, np.float32)
        parts = chunk_ranges(ELEMENTS, 0, CHUNK)[:chunks]
        for part in [*parts[: twice + 1], *parts[twice:]] if parts else []:
            values = delta[part.start : part.stop].copy()
            feedback.apply(part, values)
            payload = self.codec.encode(values, seed=rounding_seed(*feedback.kept.seed, part.index))
            decoded = self.codec.decode(payload, part.elements)
            before = sent[part.start : part.stop]
            assert not before.any() or np.array_equal(before, decoded), "a chunk sent again is the same chunk"
            before[:] = decoded
        feedback.close()
        return sent


def carried(worker: Worker, number: int, included: int | None):
    """What the next update would add to a change of zero, before it is quantised."""
    exact = Worker(worker._root, "none")
    return exact.send(number, np.zeros(ELEMENTS, np.float32), included)


@pytest.mark.parametrize("codec", ["topk", "int4", "int8"])
@settings(max_examples=15)
@given(fates=st.lists(st.sampled_from(["counts", "lost", "crash", "skipped", "again"]), min_size=1, max_size=7))
def test_what_was_counted_and_what_is_carried_add_up_to_everything(tmp_path_factory, codec, fates):
    worker = Worker(tmp_path_factory.mktemp("w"), codec)
    random = np.random.default_rng(1)
    counted = np.zeros(ELEMENTS)
    total = np.zeros(ELEMENTS)
    included: int | None = None
    for number, fate in enumerate(fates, start=1):
        delta = random.standard_normal(ELEMENTS).astype(np.float32)
        if fate == "skipped":
            continue
        if fate == "crash":
            worker.send(number, delta, included, chunks=2)
        sent = worker.send(number, delta, included, twice=1)
        if fate == "again":
            assert np.array_equal(worker.send(number, delta, included), sent), "the same round is the same update"
        total += delta
        if fate != "lost":
            counted += sent
            included = number
    rest = carried(worker, len(fates) + 1, included)
    np.testing.assert_allclose(counted + rest, total, rtol=0, atol=2e-4)


def test_without_an_earlier_update_nothing_is_added(tmp_path):
    delta = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)
    assert np.array_equal(Worker(tmp_path, "none").send(1, delta, None), delta)


def test_a_damaged_folder_costs_the_residual_and_not_the_round(tmp_path):
    worker = Worker(tmp_path, "int8")
    delta = np.ones(ELEMENTS, np.float32)
    worker.send(1, delta, None)
    (tmp_path / JOB / "kept.json").write_text("{")
    assert np.allclose(worker.send(2, delta, 1), delta, atol=0.01)
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
