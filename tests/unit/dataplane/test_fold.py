"""Folding sealed updates against an independent float64 reference."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_common.codec import WeightCompressor
from cortex_common.errors import CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.identity import Identity, Role
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.security.marks import HighWaterMarks
from cortex_common.storage import DirectoryBlobStore
from cortex_common.storage.records import last_record, record
from cortex_common.tensors import Arena, Manifest, TensorKind, chunk_count, chunk_ranges, model_sha256
from cortex_common.transfer import Receipt
from services.aggregator import domain
from services.aggregator.batches import BatchProcessor, FoldPlan, FoldTargets
from services.aggregator.domain import Contribution, RoundKey, RoundTerms
from services.aggregator.spool import SeatSpool
from services.aggregator.store import DirectoryRoundStore, StoredRound, _load_round
from services.aggregator.strategies import create_strategy
from services.aggregator.versions import Version, VersionStore

KEY = EncryptionManager.new_data_key()
CRYPT = EncryptionManager(KEY)
ROUND = RoundKey("job-1", 1, 0)


def header_of(manifest: Manifest, codec: WeightCompressor, seat: int = 0) -> ObjectHeader:
    return ObjectHeader(
        kind=ObjectKind.UPDATE,
        network="cortex",
        job_id="job-1",
        round=1,
        attempt=0,
        fence=1,
        sender=f"w{seat}",
        seat=seat,
        key_id=KEY.key_id,
        codec=codec.codec,
        codec_options=codec.options_json,
        chunk_elements=256,
        elements=manifest.elements,
        counters=manifest.counters,
        chunks=chunk_count(manifest.elements, manifest.counters, 256),
        manifest_sha256=manifest.sha256,
    ).fresh()


class Memory:
    """Sealed chunks of an arena, in memory; also takes what a fold writes."""

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena | None = None,
        codec: str = "none",
        seat: int = 0,
        chunk_elements: int = 256,
    ) -> None:
        compressor = WeightCompressor.create(codec)
        self.header = header_of(manifest, compressor, seat)
        sealer = CRYPT.sealer(self.header)
        self.chunks: list[bytes] = []
        for part in chunk_ranges(manifest.elements, manifest.counters, chunk_elements) if arena else ():
            plain = (
                compressor.encode_counters(arena.counters)
                if part.is_counters
                else compressor.encode(arena.values[part.start : part.stop])
            )
            self.chunks.append(sealer.seal(part.index, plain))

    def read(self, index: int) -> bytes:
        return self.chunks[index]

    def write(self, data: bytes | memoryview) -> None:
        self.chunks.append(bytes(data))

    def decoded(self, manifest: Manifest) -> Arena:
        arena, opener = Arena.zeros(manifest), CRYPT.opener(self.header)
        codec = WeightCompressor.from_wire(self.header.codec, self.header.codec_options)
        for part in chunk_ranges(manifest.elements, manifest.counters, 256):
            plain = opener.open(part.index, self.chunks[part.index])
            if part.is_counters:
                arena.counters[:] = codec.decode_counters(plain, part.elements)
            else:
                codec.decode(plain, part.elements, arena.values[part.start : part.stop])
        return arena


def fold(manifest: Manifest, base: Memory, updates: list[Memory], weights: list[float], threads: int = 2) -> tuple:
    target, processor = Memory(manifest), BatchProcessor(threads)
    plan = FoldPlan(manifest, base, updates, weights, create_strategy("fedavg", "{}"), target.header)
    try:
        result = processor.fold(plan, CRYPT, FoldTargets(target))  # type: ignore[arg-type]
    finally:
        processor.close()
    assert result.values.sizes == tuple(len(chunk) for chunk in target.chunks)
    return target.decoded(manifest), result


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(0, 3),
    st.lists(st.floats(0.1, 1e5), min_size=1, max_size=5),
    st.sampled_from(["none", "int8"]),
    st.integers(0, 1000),
)
def test_a_fold_is_the_weighted_mean_in_float64(
    elements: int, counters: int, weights: list[float], codec: str, seed: int
) -> None:
    layout = [("w", (elements,), TensorKind.TRAINABLE), ("n", (counters,), TensorKind.COUNTER)]
    manifest, rng = Manifest.of(layout), np.random.default_rng(seed)

    def random() -> Arena:
        return Arena(rng.standard_normal(elements).astype(np.float32), rng.integers(-9, 9, counters))

    base, arenas = random(), [random() for _ in weights]
    updates = [Memory(manifest, arena, codec, seat) for seat, arena in enumerate(arenas)]
    arena, result = fold(manifest, Memory(manifest, base), updates, weights)
    sent = [update.decoded(manifest).values.astype(np.float64) for update in updates]
    total = np.zeros(elements)
    for weight, values in zip(weights, sent, strict=True):
        total += weight * values
    want = (base.values.astype(np.float64) + total / sum(weights)).astype(np.float32)
    assert arena.values.tobytes() == want.tobytes()
    assert arena.counters.tolist() == np.max([base.counters, *(each.counters for each in arenas)], axis=0).tolist()
    assert result.header.model_sha256 == model_sha256(manifest, arena)
    assert result.update_norm == pytest.approx(float(np.linalg.norm(total / sum(weights))), rel=1e-9)


def test_the_number_of_threads_changes_nothing() -> None:
    manifest = Manifest.of([("w", (5000,), TensorKind.TRAINABLE)])
    rng = np.random.default_rng(0)
    arenas = [Arena(rng.standard_normal(5000).astype(np.float32), np.zeros(0, np.int64)) for _ in range(4)]
    base, updates = Memory(manifest, arenas[0]), [Memory(manifest, arena) for arena in arenas]
    digests = {fold(manifest, base, updates, [1, 2, 3, 4], threads)[1].header.model_sha256 for threads in (1, 2, 5)}
    assert len(digests) == 1


def test_a_damaged_update_is_named_and_no_thread_goes_on() -> None:
    manifest = Manifest.of([("w", (5000,), TensorKind.TRAINABLE)])
    arena = Arena.zeros(manifest)
    bad = Memory(manifest, arena, seat=7)
    bad.chunks[3] = bad.chunks[3][:-1] + b"\0"
    with pytest.raises(CorruptError, match="chunk 3 of the update of job job-1 round 1 by w7 does not open"):
        fold(manifest, Memory(manifest, arena), [bad], [1.0])


@pytest.mark.parametrize(
    ("name", "options"), [("other", "{}"), ("fedavg", '{"a":1}'), ("fedavg", "[]"), ("fedavg", "{")]
)
def test_strategies_refuse_what_they_do_not_know(name: str, options: str) -> None:
    with pytest.raises(InvalidArgumentError):
        create_strategy(name, options)


TERMS = RoundTerms(ROUND, 1, "ab" * 32, {0: "w0", 1: "w1"}, "none", "{}", "fedavg", "{}", 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": RoundKey("../x", 1, 0)}, "job_id"),
        ({"upstream": domain.Upstream("a", "a:1", "job-1-t3", 0, "../x")}, "job_id"),
        ({"key": RoundKey("job-1", 0, 0)}, "round 0 is one seat"),
        ({"seats": {}}, "round.seats: 0 given"),
        ({"seats": dict.fromkeys(range(9), "w")}, "round.seats: 9 given; allowed are 1 to 8"),
        ({"base_sha256": "x"}, "64 hex digits"),
        ({"chunk_elements": 1}, "chunk_elements 1"),
    ],
)
def test_impossible_rounds_are_refused(change: dict, message: str) -> None:
    domain.check_terms(TERMS, 8)
    with pytest.raises(InvalidArgumentError, match=message):
        domain.check_terms(replace(TERMS, **change), 8)


RECEIPT = Receipt("job-1", 1, 0, 0, "w0", "cd" * 32, 2.0, 10, 1)
LISTED = Contribution(0, "w0", "cd" * 32, 2.0)


@pytest.mark.parametrize(
    ("listed", "kind", "message"),
    [
        ([], InvalidArgumentError, "at least one seat"),
        ([LISTED, LISTED], InvalidArgumentError, "each once"),
        ([replace(LISTED, weight=0.0)], InvalidArgumentError, "add up to more than 0"),
        ([replace(LISTED, weight=float("nan"))], InvalidArgumentError, "finite"),
        ([replace(LISTED, seat=1)], PreconditionError, "no update of seat 1"),
        ([replace(LISTED, content_sha256="ee" * 32)], PreconditionError, "listed is eeee"),
        ([replace(LISTED, worker="w3")], PreconditionError, "of w3"),
    ],
)
def test_lists_that_cannot_be_sealed_are_refused(listed: list, kind: type, message: str) -> None:
    assert domain.check_contributions(ROUND, [LISTED], {0: RECEIPT}) == (LISTED,)
    with pytest.raises(kind, match=message):
        domain.check_contributions(ROUND, listed, {0: RECEIPT})


def test_rounds_and_fences_survive_and_an_unopened_folder_is_swept(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    store.save(StoredRound(TERMS, domain.Phase.ABORTED, "why"))
    store.raise_fence("job-1", 5)
    store.raise_fence("job-1", 4)
    (tmp_path / "spool" / "job-1" / "2-0").mkdir()
    again = DirectoryRoundStore(tmp_path)
    assert list(again.load()) == [StoredRound(TERMS, domain.Phase.ABORTED, "why")]
    assert again.fence("job-1") == 5
    assert not (tmp_path / "spool" / "job-1" / "2-0").exists()
    again.erase(ROUND)
    assert list(again.load()) == []
    assert Identity("cortex", Role.WORKER, "w0")


class KilledError(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("removed", range(5))
def test_a_round_whose_erasure_was_killed_is_taken_up_and_erased_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    store = DirectoryRoundStore(tmp_path)
    kept = StoredRound(TERMS, domain.Phase.SEALED)
    store.save(kept)
    folder = store.directory(ROUND)
    for seat in range(4):
        (folder / f"seat-{seat}.update").write_bytes(b"")
    unlink, left = Path.unlink, [removed]

    def until_killed(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        unlink(path, missing_ok)

    # As a disk may list them: what it lists last is what is left.
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(path.glob("*"))))
    monkeypatch.setattr(Path, "unlink", until_killed)
    with pytest.raises(KilledError):
        store.erase(ROUND)
    monkeypatch.undo()
    again = DirectoryRoundStore(tmp_path)
    assert list(again.load()) == [kept]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    again.erase(ROUND)
    assert list(DirectoryRoundStore(tmp_path).load()) == []


def test_a_spool_forgets_only_the_torn_chunk(tmp_path: Path) -> None:
    header = header_of(Manifest.of([("w", (1000,), TensorKind.TRAINABLE)]), WeightCompressor.create("none"))
    chunks = [b"a" * 50, b"b" * 60, b"c" * 70]
    for cut in range(3 * 4 + 180 + 1):
        spool = SeatSpool.start(tmp_path, header)
        begin = (tmp_path / "seat-0.update").stat().st_size
        for chunk in chunks:
            spool.append(chunk)
        spool.close()
        os.truncate(tmp_path / "seat-0.update", begin + cut)
        loaded, receipt = SeatSpool.load(tmp_path, 0)
        whole = sum(cut >= end for end in (54, 118, 192))
        assert (loaded.chunks, loaded.unproven, receipt) == (whole, whole, None)
        assert [loaded.read(index) for index in range(whole)] == chunks[:whole]
        for chunk in chunks[whole:]:
            loaded.append(chunk)
        assert [loaded.read(index) for index in range(3)] == chunks
        loaded.erase()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 2 << 20])
def test_a_receipt_counts_once_it_is_whole_and_for_its_very_chunks(tmp_path: Path, size: int) -> None:
    header = header_of(Manifest.of([("w", (1000,), TensorKind.TRAINABLE)]), WeightCompressor.create("none"))
    path = tmp_path / "seat-0.update"
    spool = SeatSpool.start(tmp_path, replace(header, chunks=1))
    spool.append(b"c" * size)
    before = path.stat().st_size
    spool.commit(RECEIPT)
    spool.close()
    loaded, receipt = SeatSpool.load(tmp_path, 0)
    assert (receipt, loaded.unproven, loaded.read(0)) == (RECEIPT, 0, b"c" * size)
    loaded.close()
    whole = path.read_bytes()
    for end in (before, before + 5, before + 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        loaded, receipt = SeatSpool.load(tmp_path, 0)
        assert (receipt, loaded.unproven, path.stat().st_size) == (None, 1, before)
        loaded.close()
    if size < 1 << 20:
        # Synced in one go with its receipt: a power cut may leave the one and not the other.
        path.write_bytes(whole[: before - 50] + bytes(50) + whole[before:])
        with pytest.raises(CorruptError, match="not those it was accepted with"):
            SeatSpool.load(tmp_path, 0)
    path.write_bytes(whole[:10])
    with pytest.raises(CorruptError, match="no header"):
        SeatSpool.load(tmp_path, 0)


def test_a_torn_state_of_a_round_leaves_the_one_before(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    path = store.directory(ROUND) / "round.log"
    store.save(StoredRound(TERMS, domain.Phase.OPEN))
    first, unmarked = path.stat().st_size, (tmp_path / "marks").read_bytes()
    store.save(StoredRound(TERMS, domain.Phase.SEALED))
    assert [each.phase for each in store.load()] == [domain.Phase.SEALED]
    # The mark follows once the state is on the disk: a torn one has none.
    (tmp_path / "marks").write_bytes(unmarked)
    os.truncate(path, path.stat().st_size - 1)
    store = DirectoryRoundStore(tmp_path)
    assert [each.phase for each in store.load()] == [domain.Phase.OPEN]
    store.save(StoredRound(TERMS, domain.Phase.SEALED))
    assert [each.phase for each in store.load()] == [domain.Phase.SEALED]
    (tmp_path / "marks").unlink()
    os.truncate(path, first - 1)
    assert list(DirectoryRoundStore(tmp_path).load()) == []


def test_a_round_stored_before_regions_lay_in_regions_takes_versions_from_the_round_above(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    above = domain.Upstream("aggregator-1", "a:1", "job-1", 0)
    terms = replace(TERMS, key=RoundKey("job-1-t0", 1, 0), upstream=above)
    store.save(StoredRound(terms, domain.Phase.OPEN))
    path = store.directory(terms.key) / "round.log"
    facts = json.loads(last_record_of(path))
    assert facts["terms"]["upstream"].pop("model_job_id") == "job-1"
    path.write_bytes(record(json.dumps(facts).encode()))
    (tmp_path / "marks").unlink()
    (loaded,) = DirectoryRoundStore(tmp_path).load()
    assert loaded.terms == terms
    assert loaded.terms.model_job_id == "job-1"
    between = replace(terms, upstream=replace(above, job_id="job-1-t3", model_job_id="job-1"))
    store.save(StoredRound(between, domain.Phase.OPEN))
    (loaded,) = DirectoryRoundStore(tmp_path).load()
    assert (loaded.terms, loaded.terms.model_job_id) == (between, "job-1")


def last_record_of(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return last_record(file)[0]
    finally:
        os.close(file)


def test_a_state_of_a_round_that_was_on_the_disk_is_never_taken_back(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    path = store.directory(ROUND) / "round.log"
    store.save(StoredRound(TERMS, domain.Phase.OPEN))
    older = path.read_bytes()
    store.save(StoredRound(TERMS, domain.Phase.SEALED))
    path.write_bytes(older)
    with pytest.raises(CorruptError, match="it is an older one put back: version 1, but 2 was written here"):
        _load_round(path.parent, HighWaterMarks(tmp_path))
    assert list(DirectoryRoundStore(tmp_path).load()) == []
    assert path.parent.with_name("1-0.damaged").is_dir()
    # The round is opened again, and that counts: also after one more start.
    again = DirectoryRoundStore(tmp_path)
    again.save(StoredRound(TERMS, domain.Phase.OPEN))
    assert [each.phase for each in DirectoryRoundStore(tmp_path).load()] == [domain.Phase.OPEN]


def test_a_round_whose_log_is_gone_is_no_round_that_was_never_opened(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    store.save(StoredRound(TERMS, domain.Phase.OPEN))
    (store.directory(ROUND) / "round.log").write_bytes(b"")
    with pytest.raises(CorruptError, match="it is gone, but version 1 was written here"):
        _load_round(store.directory(ROUND), HighWaterMarks(tmp_path))
    assert list(DirectoryRoundStore(tmp_path).load()) == []
    assert store.directory(ROUND).with_name("1-0.damaged").is_dir()


def test_a_round_erased_and_opened_again_counts(tmp_path: Path) -> None:
    store = DirectoryRoundStore(tmp_path)
    store.save(StoredRound(TERMS, domain.Phase.OPEN))
    stale = (tmp_path / "marks").read_bytes()
    store.erase(ROUND)
    store.save(StoredRound(TERMS, domain.Phase.ABORTED, "why"))
    # A power cut took both changes of the marks.
    (tmp_path / "marks").write_bytes(stale)
    assert list(DirectoryRoundStore(tmp_path).load()) == [StoredRound(TERMS, domain.Phase.ABORTED, "why")]


def test_an_older_fence_is_not_taken(tmp_path: Path) -> None:
    store, path = DirectoryRoundStore(tmp_path), tmp_path / "fences" / "job-1"
    store.raise_fence("job-1", 4)
    older = path.read_bytes()
    store.raise_fence("job-1", 5)
    for bad in (older, b"4", b"9"):
        path.write_bytes(bad)
        with pytest.raises(CorruptError, match=rf"{path} is not readable: it is an older one put back"):
            DirectoryRoundStore(tmp_path).fence("job-1")
    path.unlink()
    with pytest.raises(CorruptError, match="it is gone"):
        DirectoryRoundStore(tmp_path).fence("job-1")
    # An operator who means it.
    path.write_bytes(older)
    (tmp_path / "marks").unlink()
    store = DirectoryRoundStore(tmp_path)
    assert store.fence("job-1") == 4
    store.forget_fence("job-1")
    assert DirectoryRoundStore(tmp_path).fence("job-1") == 0


def version_of(round_number: int, blob: str, digest: str) -> Version:
    header = replace(header_of(Manifest.of([("w", (1,), TensorKind.TRAINABLE)]), WeightCompressor.create("none")))
    header = replace(header, kind=ObjectKind.MODEL, round=round_number, model_sha256=digest)
    return Version(header, (3,), "ee" * 32, blob, 100, 0.5, (LISTED,), 1, 12.0)


def test_a_version_exists_once_its_facts_do(tmp_path: Path) -> None:
    blobs = DirectoryBlobStore(tmp_path)
    versions = VersionStore(blobs)
    first = version_of(1, "job-1/1-0-aa.blob", "11" * 32)
    blobs.put(first.blob, b"abc")
    versions.commit(first)
    blobs.put("job-1/2-0-bb.blob", b"unfinished")
    again = VersionStore(blobs)
    again.load()
    assert again.of_job("job-1") == (first,)
    assert again.open(first).read(0) == b"abc"
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == ["1-0-aa.blob", "1.json"]
    blobs.put("job-1/1-1-cc.blob", b"xyz")
    second = version_of(1, "job-1/1-1-cc.blob", "22" * 32)
    again.commit(second)
    assert again.by_sha256("job-1", "22" * 32) == second
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == ["1-1-cc.blob", "1.json"]
    again.delete(second)
    assert json.dumps([path.name for path in tmp_path.rglob("*.*")]) == "[]"
