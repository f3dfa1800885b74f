"""Which version of a round counts, and which ones a prune may drop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cortex_common.errors import PreconditionError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.security.encryption import DataKey, EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.storage import DirectoryBlobStore
from cortex_common.storage.checked import from_checked_json, to_checked_json
from cortex_common.tensors import Manifest, TensorKind
from services.aggregator.domain import Contribution, Phase, RoundKey, RoundTerms, Upstream
from services.aggregator.pruning import droppable, is_settled
from services.aggregator.resealing import reseal
from services.aggregator.rounds import LiveRound, members_of
from services.aggregator.versions import Version, VersionStore
from tests.tampering import objects

JOB = JobId("job-1")
MANIFEST = Manifest.of([("w", (100,), TensorKind.TRAINABLE)])


def version(store: VersionStore, number: int, attempt: int, sha256: str, *, commit: bool = True) -> Version:
    header = ObjectHeader(
        ObjectKind.MODEL, "cortex", JOB, RoundNumber(number), attempt, 1, NodeName("a"), SeatIndex(0), KeyId("k"),
        "none", "{}", 1024, 100, 0, 1, MANIFEST.sha256, model_sha256=sha256, manifest=MANIFEST.to_json(),
    ).fresh()  # fmt: skip
    with store.draft(header) as draft:
        draft.values.write(b"sealed")
        made = Version(header, (6,), Sha256Hex("0"), draft.blob, 400, 0.0, (), 0, 0.0)
        if commit:
            draft.commit(made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(DirectoryBlobStore(tmp_path))


def test_an_older_attempt_that_ends_late_replaces_nothing_and_leaves_nothing(
    store: VersionStore, tmp_path: Path
) -> None:
    newer = version(store, 1, 1, "newer")
    with pytest.raises(PreconditionError, match="attempt 1"):
        version(store, 1, 0, "older")
    assert store.of_round(JOB, RoundNumber(1)) == newer
    assert sorted(path.suffix for path in (tmp_path / JOB).iterdir()) == [".blob", ".json"]
    again = VersionStore(DirectoryBlobStore(tmp_path))
    again.load()
    assert again.of_round(JOB, RoundNumber(1)) == newer


def test_deleting_a_version_that_was_replaced_spares_the_one_that_counts(store: VersionStore) -> None:
    older = version(store, 1, 0, "older")
    newer = version(store, 1, 1, "newer")
    store.delete(older)
    assert store.of_round(JOB, RoundNumber(1)) == newer
    assert store.is_whole(newer.whole)


def test_all_versions_can_be_gone_through_while_others_come_and_go(store: VersionStore) -> None:
    first = version(store, 1, 0, "first")
    second = version(store, 2, 0, "second")
    every = store.all()
    assert next(every) is first
    version(store, 3, 0, "third")
    store.delete(first)
    assert list(every) == [second]


def test_a_blob_that_is_gone_or_short_is_noticed(store: VersionStore, tmp_path: Path) -> None:
    made = version(store, 1, 0, "sha")
    assert store.is_whole(made.whole)
    (tmp_path / made.blob).write_bytes(b"seal")
    assert not store.is_whole(made.whole)
    (tmp_path / made.blob).unlink()
    assert not store.is_whole(made.whole)


def test_who_may_download_a_version_is_kept_with_it_and_only_grows(store: VersionStore, tmp_path: Path) -> None:
    made = version(store, 1, 0, "sha")
    assert not made.has_member(NodeName("w1"))
    names = frozenset(map(NodeName, ("w2", "w1")))
    for admitted in (names, frozenset({NodeName("w2")}), frozenset[NodeName]()):
        store.admit(JOB, RoundNumber(1), admitted)
    store.admit(JOB, RoundNumber(7), names)
    again = VersionStore(DirectoryBlobStore(tmp_path))
    again.load()
    kept = again.of_round(JOB, RoundNumber(1))
    assert kept == replace(made, readers=(NodeName("w1"), NodeName("w2")))
    assert [kept.has_member(NodeName(name)) for name in ("w1", "w3")] == [True, False]


def test_of_versions_from_before_their_contributors_are_known(store: VersionStore, tmp_path: Path) -> None:
    made = version(store, 1, 0, "sha", commit=False)
    header = replace(made.header).fresh()
    with store.draft(header) as draft:
        draft.values.write(b"sealed")
        listed = (Contribution(SeatIndex(0), NodeName("w1"), Sha256Hex("0"), 1.0),)
        draft.commit(replace(made, header=header, blob=draft.blob, contributions=listed))
    path = tmp_path / JOB / "1.json"
    facts = from_checked_json(path.read_bytes())
    del facts["readers"]
    path.write_bytes(to_checked_json(facts))
    again = VersionStore(DirectoryBlobStore(tmp_path))
    again.load()
    kept = again.of_round(JOB, RoundNumber(1))
    assert [kept.has_member(NodeName(name)) for name in ("w1", "w2")] == [True, False]


def seated(
    number: int, attempt: int, *workers: str, tier: int | None = None, readers: tuple[str, ...] = ()
) -> LiveRound:
    job_id = JOB if tier is None else JobId(f"{JOB}-t{tier}")
    up = None if tier is None else Upstream(NodeName("root"), "root:1", JOB, SeatIndex(tier))
    seats = {SeatIndex(index): NodeName(name) for index, name in enumerate(workers)}
    key = RoundKey(job_id, RoundNumber(number), attempt)
    others = tuple(map(NodeName, readers))
    return LiveRound(RoundTerms(key, 1, "v0", seats, "none", "{}", "fedavg", "{}", 1024, up, readers=others))


def test_the_members_of_a_job_are_those_of_its_newest_round_in_all_tiers() -> None:
    def members(*rounds: LiveRound) -> set[str]:
        return set(members_of({each.terms.key: each for each in rounds}, JOB))

    assert members() == set()
    assert members(seated(1, 0, "w1", "w2", readers=("w3",))) == {"w1", "w2", "w3"}
    assert members(seated(1, 0, "w1"), seated(1, 1, "w2"), seated(0, 3, "w3")) == {"w2"}
    assert members(seated(2, 1, "w1", tier=0), seated(2, 1, "w2", tier=1), seated(1, 1, "w3", tier=2)) == {"w1", "w2"}
    assert members(seated(1, 0, "w1"), seated(2, 0, "w2", tier=0)) == {"w2"}


def live(number: int, base: str, phase: Phase, attempt: int = 0, upstream: bool = False) -> LiveRound:
    key = RoundKey(JobId(f"{JOB}-t0") if upstream else JOB, RoundNumber(number), attempt)
    up = Upstream(NodeName("root"), "root:1", JOB, SeatIndex(0)) if upstream else None
    return LiveRound(RoundTerms(key, 1, base, {}, "none", "{}", "fedavg", "{}", 1024, up), phase)


@pytest.mark.parametrize(
    ("keep", "ended", "rounds", "dropped"),
    [
        ((2,), False, [], [0, 1]),
        ((0, 2), False, [], [1]),
        ((1,), False, [], [0]),
        ((), False, [], []),
        ((2,), False, [live(2, "v1", Phase.OPEN)], [0]),
        ((9,), False, [live(4, "v2", Phase.SEALED)], [0, 1]),
        ((9,), False, [live(2, "v1", Phase.SEALED)], [0, 1, 2]),
        ((9,), False, [live(4, "v0", Phase.OPEN, upstream=True)], [1, 2]),
        ((9,), False, [live(4, "v0", Phase.SEALED, upstream=True)], [0, 1, 2]),
        ((9,), False, [live(4, "v0", Phase.ABORTED)], [0, 1, 2]),
        ((0,), True, [live(4, "v2", Phase.OPEN)], [1, 2]),
        ((), True, [], [0, 1, 2]),
    ],
)
def test_what_a_prune_drops(
    store: VersionStore, keep: tuple[int, ...], ended: bool, rounds: list[LiveRound], dropped: list[int]
) -> None:
    for number in range(3):
        version(store, number, 0, f"v{number}")
    keep_rounds = [RoundNumber(number) for number in keep]
    assert [each.header.round for each in droppable(store, JOB, rounds, keep_rounds, ended=ended)] == dropped


@pytest.mark.parametrize(
    ("round_", "newest", "settled"),
    [
        (live(1, "v0", Phase.OPEN), 1, False),
        (live(1, "v0", Phase.ABORTED), 1, True),
        (live(1, "v0", Phase.SEALED), 1, True),
        (live(2, "v1", Phase.SEALED), 2, False),
        (live(2, "v1", Phase.SEALED), 3, True),
        (live(1, "v0", Phase.SEALED, attempt=1), 1, False),
        (live(1, "v0", Phase.SEALED, upstream=True), 1, False),
        (live(1, "v0", Phase.SEALED, upstream=True), 2, True),
    ],
)
def test_a_frozen_round_is_settled_once_its_version_is_here_or_a_later_round_is(
    store: VersionStore, round_: LiveRound, newest: int, settled: bool
) -> None:
    version(store, 0, 0, "v0")
    version(store, 1, 0, "v1")
    last = RoundKey(round_.terms.key.job_id, RoundNumber(newest), 9)
    assert is_settled(round_, store, last if newest > round_.terms.key.round else round_.terms.key) is settled


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted on Linux")
def test_resealing_leaves_no_file_open(store: VersionStore, tmp_path: Path) -> None:
    header, chunks = objects.model()
    with store.draft(header) as draft:
        for chunk in chunks:
            draft.values.write(chunk)
        draft.commit(Version(header, tuple(map(len, chunks)), Sha256Hex("0"), draft.blob, 400, 0.0, (), 0, 0.0))
    for number in (1, 2):
        key = DataKey(KeyId(f"new-{number}"), number, bytes([number]) * 32)
        known = EncryptionManager(*objects.KEYS.values(), DataKey(KeyId("new-1"), 1, b"\1" * 32), key)
        assert reseal(store, JOB, known, key.key_id) == 1
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert [path for path in opened if path.is_relative_to(tmp_path)] == []
