"""What every store of the coordinator does; a test module inherits it and gives the fixture `store`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.errors import ConflictError
from cortex_common.ids import JobId, KeyId
from cortex_common.job.status import RoundReport
from cortex_common.security.keyring import RestingKey
from services.coordinator.domain.job import Note, Stage
from services.coordinator.domain.reach import EVERYTHING, Reach
from services.coordinator.store import StoredDataset, StoredKey
from tests.unit.coordinator.jobs import collecting, new_job, trained, update, version

NOTE = Note("job_submitted", 0, "by ann")


class JobStoreConformance:
    """The suite."""

    def test_a_job_comes_back_as_it_was(self, store):
        epoch = store.acquire("me", 1.0)
        job = new_job()
        assert store.insert(job, None, NOTE, epoch, 1.0) == job.id
        assert store.get(job.id, EVERYTHING) == job
        assert store.unfinished() == [job]
        assert store.get(JobId("other"), EVERYTHING) is None

    def test_keys_are_stored_with_their_job(self, store):
        epoch = store.acquire("me", 1.0)
        job = new_job()
        keys = [StoredKey(KeyId("k1"), 1, RestingKey("kek", b"\0wrapped"), 1.5, "job submitted", 2, 3)]
        store.insert(job, "r1", NOTE, epoch, 1.0, keys)
        assert store.keys(job.id) == keys
        assert store.keys(JobId("other")) == []
        again = [replace(keys[0], key_id=KeyId("k2"))]
        store.insert(replace(job, id=JobId("j2")), "r1", NOTE, epoch, 1.0, again)
        assert store.keys(job.id) == keys
        assert store.keys(JobId("j2")) == []

    def test_a_step_may_begin_a_key_epoch_and_what_is_not_needed_is_erased(self, store):
        epoch = store.acquire("me", 1.0)
        job = new_job()
        keys = [StoredKey(KeyId(f"k{n}"), n, RestingKey("kek", b"wrapped"), 1.5, "why", n, 1) for n in (1, 2, 3)]
        store.insert(job, None, NOTE, epoch, 1.0, keys[:1])
        store.commit(job, job, [], epoch, 2.0, keys[1:2])
        store.commit(job, job, [], epoch, 2.0, keys[2:])
        assert store.keys(job.id) == keys
        assert store.erase_keys(job.id, frozenset({1, 3}), epoch) == [1, 3]
        assert store.erase_keys(job.id, frozenset({1, 3, 4}), epoch) == []
        first, second, third = store.keys(job.id)
        assert second == keys[1]
        assert (first.is_erased, third.is_erased) == (True, True)
        assert first == replace(keys[0], resting=RestingKey("kek", b""))
        with pytest.raises(ConflictError):
            store.erase_keys(job.id, frozenset(), epoch - 1)

    def test_keys_come_to_rest_under_another_key_encryption_key(self, store):
        epoch = store.acquire("me", 1.0)
        owned = []
        for job_id in ("a", "b"):
            keys = [StoredKey(KeyId(f"{job_id}{n}"), n, RestingKey("old", b"w"), 1.5, "why") for n in (1, 2, 3)]
            store.insert(replace(new_job(), id=JobId(job_id)), None, NOTE, epoch, 1.0, keys)
            store.erase_keys(JobId(job_id), frozenset({3}), epoch)
            owned += [(job_id, key) for key in keys[:2]]
        assert store.keys_under_others("new", None, 10) == owned
        assert store.keys_under_others("old", None, 10) == []
        assert store.keys_under_others("new", None, 3) == owned[:3]
        assert store.keys_under_others("new", ("a", 2), 10) == owned[2:]
        assert store.kek_ids() == {"old"}
        store.erase_keys(JobId("b"), frozenset({1}), epoch)
        moved = [(each, RestingKey("new", b"n")) for each in owned]
        assert store.rewrap_keys(moved, epoch) == 3, "one was erased meanwhile, and stays so"
        assert store.rewrap_keys(moved, epoch) == 0
        assert [key.resting.wrapped for key in store.keys(JobId("b"))] == [b"", b"n", b""]
        assert store.kek_ids() == {"new"}
        with pytest.raises(ConflictError):
            store.rewrap_keys(moved, epoch - 1)

    def test_the_same_request_is_the_same_job(self, store):
        epoch = store.acquire("me", 1.0)
        job = new_job()
        store.insert(job, "r1", NOTE, epoch, 1.0)
        assert store.insert(replace(job, id=JobId("j2")), "r1", NOTE, epoch, 1.0) == job.id
        assert store.find_request("r1") == job.id
        assert store.find_request("r2") is None
        assert store.get(JobId("j2"), EVERYTHING) is None

    def test_every_step_of_a_round_is_kept(self, store):
        epoch = store.acquire("me", 1.0)
        job = collecting("a", "b")
        store.insert(job, None, NOTE, epoch, 1.0)
        entries = (replace(update(0, "a"), trained=trained("a", train_loss=0.5)), update(1, "b"))
        sealed = replace(job, stage=Stage.SEALED, sealed=entries)
        store.commit(job, sealed, [Note("round_sealed", 1, "2 updates")], epoch, 2.0)
        assert store.get(job.id, EVERYTHING) == sealed
        assert store.contributions(job.id, 1) == [update(0, "a"), update(1, "b")]

        tested = replace(sealed, stage=Stage.TESTING, version=version(1), pending=RoundReport(round=1))
        store.commit(sealed, tested, [], epoch, 3.0)
        report = RoundReport(round=1, metrics={"test_accuracy": 0.5})
        better = replace(version(1), metrics={"test_accuracy": 0.5})
        done = replace(tested, stage=Stage.GATHERING, round=2, version=better, history=(report,), pending=None)
        store.commit(tested, done, [Note("round_closed", 1, "ok")], epoch, 4.0)
        assert store.get(job.id, EVERYTHING) == done
        assert [stored.version for stored in store.versions(job.id, EVERYTHING)] == [better]
        assert [(event.sequence, event.name) for event in store.events(job.id, 0, 10, EVERYTHING)] == [
            (1, "job_submitted"),
            (2, "round_sealed"),
            (3, "round_closed"),
        ]
        assert [event.sequence for event in store.events(job.id, 2, 10, EVERYTHING)] == [3]
        assert store.newest(10, EVERYTHING) == [replace(done, history=())]

    def test_a_list_given_up_is_replaced_by_that_of_the_next_attempt(self, store):
        epoch = store.acquire("me", 1.0)
        job = collecting("a", "b")
        store.insert(job, None, NOTE, epoch, 1.0)
        sealed = replace(job, stage=Stage.SEALED, sealed=(update(0, "a"), update(1, "b")))
        store.commit(job, sealed, [], epoch, 2.0)
        again = replace(job, attempt=2)
        store.commit(sealed, again, [], epoch, 2.0)
        store.commit(again, replace(again, stage=Stage.SEALED, sealed=(update(0, "c"),)), [], epoch, 2.0)
        assert [entry.worker for entry in store.contributions(job.id, 1)] == ["c"]

    def test_pruned_versions_are_gone(self, store):
        epoch = store.acquire("me", 1.0)
        before = collecting("a")
        store.insert(before, None, NOTE, epoch, 1.0)
        for number in (1, 2, 3):
            after = replace(before, version=version(number))
            store.commit(before, after, [], epoch, 1.0)
            before = after
        store.prune_versions(before.id, frozenset({1, 3}), epoch)
        assert [stored.version.round for stored in store.versions(before.id, EVERYTHING)] == [1, 3]

    def test_a_job_is_found_by_its_organisation_only(self, store):
        epoch = store.acquire("me", 1.0)
        for job_id, org in (("j1", "acme"), ("j2", "other")):
            job = replace(collecting("a"), id=JobId(job_id), org=org)
            store.insert(job, None, NOTE, epoch, 1.0)
            store.commit(job, replace(job, version=version(1)), [], epoch, 1.0)
        acme, other = Reach("acme"), Reach("other")
        assert store.get(JobId("j1"), acme).org == "acme"
        assert store.get(JobId("j1"), other) is None
        for reach, found in ((acme, ["j1"]), (other, ["j2"]), (Reach("third"), [])):
            assert [job.id for job in store.newest(10, reach)] == found
        assert len(store.newest(10, EVERYTHING)) == 2
        assert [len(store.events(JobId("j1"), 0, 10, reach)) for reach in (acme, EVERYTHING, other)] == [1, 1, 0]
        assert [len(store.versions(JobId("j1"), reach)) for reach in (acme, EVERYTHING, other)] == [1, 1, 0]

    def test_a_data_set_is_known_once_and_its_key_may_rest_elsewhere_until_it_is_removed(self, store):
        epoch = store.acquire("me", 1.0)
        ward = StoredDataset("d1", "acme", "{}", RestingKey("kek-1", b"\0wrapped"), 1.5, "ann")
        other = replace(ward, digest="d2", added_s=0.5)
        assert store.add_dataset(ward, epoch) == ward
        assert store.add_dataset(other, epoch) == other
        assert store.add_dataset(replace(ward, org="others"), epoch) == ward, "the first one"
        assert store.datasets() == [other, ward]
        assert store.kek_ids() == {"kek-1"}
        moved = RestingKey("kek-2", b"again")
        assert store.rewrap_dataset(ward, moved, epoch) == 1
        assert store.rewrap_dataset(ward, moved, epoch) == 0, "it is not as it was read any more"
        assert store.datasets() == [other, replace(ward, key=moved)]
        assert store.kek_ids() == {"kek-1", "kek-2"}
        assert store.remove_dataset("d2", epoch)
        assert not store.remove_dataset("d2", epoch)
        for write in (
            lambda: store.add_dataset(other, epoch - 1),
            lambda: store.remove_dataset("d1", epoch - 1),
            lambda: store.rewrap_dataset(ward, moved, epoch - 1),
        ):
            with pytest.raises(ConflictError):
                write()
        assert [each.digest for each in store.datasets()] == ["d1"]

    def test_an_ended_job_cannot_be_changed(self, store):
        epoch = store.acquire("me", 1.0)
        job = collecting("a")
        store.insert(job, None, NOTE, epoch, 1.0)
        cancelled = replace(job, stage=Stage.CANCELLED)
        store.commit(job, cancelled, [], epoch, 2.0)
        with pytest.raises(ConflictError, match="ended"):
            store.commit(job, replace(job, stage=Stage.COMPLETED), [], epoch, 3.0)
        assert store.get(job.id, EVERYTHING) == cancelled
        assert store.unfinished() == [cancelled], "until it is cleaned up"
        store.commit(cancelled, replace(cancelled, cleaned=True), [], epoch, 4.0)
        assert store.unfinished() == []

    def test_a_coordinator_whose_epoch_is_over_cannot_write(self, store):
        old = store.acquire("old", 1.0)
        job = collecting("a")
        store.insert(job, None, NOTE, old, 1.0)
        new = store.acquire("new", 2.0)
        assert new == old + 1
        for write in (
            lambda: store.commit(job, replace(job, round=2), [], old, 3.0),
            lambda: store.insert(replace(job, id=JobId("j2")), None, NOTE, old, 3.0),
            lambda: store.prune_versions(job.id, frozenset(), old),
        ):
            with pytest.raises(ConflictError, match="epoch 1 is over"):
                write()
        assert store.get(job.id, EVERYTHING) == job
