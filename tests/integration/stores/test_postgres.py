"""The stores of coordinator and discovery on a real PostgreSQL: the suites of SQLite, and what only a server can do."""

from __future__ import annotations

import threading
import uuid
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cortex_common.errors import ConflictError, UnavailableError
from cortex_common.ids import JobId, KeyId
from cortex_common.security.keyring import RestingKey
from cortex_common.storage.sql import open_engine
from services.coordinator import tables as job_tables
from services.coordinator.domain.job import Note, Stage
from services.coordinator.domain.reach import EVERYTHING
from services.coordinator.sql_store import SqlStore, _check_epoch
from services.coordinator.store import StoredKey
from services.discovery import tables as node_tables
from services.discovery.sql_store import SqlSnapshotStore
from tests.conformance.job_store import NOTE, JobStoreConformance
from tests.conformance.snapshot_store import NODES, SnapshotStoreConformance
from tests.unit.coordinator.jobs import collecting, new_job


@pytest.fixture
def opened(postgres_server):
    """Makes engines for a database of the test's own."""
    url, engines = postgres_server.database(uuid.uuid4().hex), []

    def engine():
        engines.append(open_engine(url, postgres_server.password_file))
        return engines[-1]

    yield engine
    for each in engines:
        each.dispose()


class TestJobs(JobStoreConformance):
    @pytest.fixture
    def store(self, opened):
        return SqlStore(opened())


class TestSnapshots(SnapshotStoreConformance):
    @pytest.fixture
    def store(self, opened):
        return SqlSnapshotStore(opened())


def test_both_services_share_one_database(opened):
    jobs, nodes = SqlStore(opened()), SqlSnapshotStore(opened())
    jobs.insert(new_job(), None, NOTE, jobs.acquire("me", 1.0), 1.0)
    nodes.save(NODES)
    assert SqlStore(opened()).get(JobId("j1"), EVERYTHING) == new_job()
    assert SqlSnapshotStore(opened()).load() == NODES
    with opened().connect() as connection:
        for tables, version in ((job_tables, "alembic_version"), (node_tables, node_tables.REVISION_TABLE)):
            mine = set(tables.METADATA.tables)
            options = {
                "version_table": version,
                "include_name": lambda name, kind, _, mine=mine: kind != "table" or name in mine,
            }
            assert compare_metadata(MigrationContext.configure(connection, opts=options), tables.METADATA) == []


def test_who_takes_the_lease_waits_for_a_commit_under_way(opened):
    """Otherwise a coordinator that was replaced could still write, between its look at the lease and its commit."""
    old, new = SqlStore(opened()), SqlStore(opened())
    epoch = old.acquire("old", 1.0)
    job = new_job()
    old.insert(job, None, NOTE, epoch, 1.0)
    engine = opened()
    taken = threading.Event()
    with engine.begin() as looking:
        _check_epoch(looking, epoch)
        thread = threading.Thread(target=lambda: (new.acquire("new", 2.0), taken.set()))
        thread.start()
        assert not taken.wait(0.5), "the lease was taken while a commit under it was under way"
    assert taken.wait(10)
    thread.join()
    with pytest.raises(ConflictError, match="is over"):
        old.commit(job, replace(job, round=2), [], epoch, 3.0)


def test_two_coordinators_that_start_on_an_empty_database_get_different_epochs(opened):
    stores = [SqlStore(opened()), SqlStore(opened())]
    epochs, failures = [], []

    def acquire(store):
        try:
            epochs.append(store.acquire("x", 1.0))
        except ConflictError as error:
            failures.append(error)

    threads = [threading.Thread(target=acquire, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(epochs) + len(failures) == 2
    assert sorted(epochs) == list(range(1, len(epochs) + 1))


def test_words_that_no_column_takes_as_they_are_are_stored_nearly_so(opened):
    """SQLite takes them; here each would end the coordinator, and again after its restart."""
    store = SqlStore(opened())
    epoch = store.acquire("me", 1.0)
    job = collecting("a")
    store.insert(job, None, NOTE, epoch, 1.0)
    left = ", ".join(f"worker w{number}" for number in range(100)) + " left"
    failed = replace(job, stage=Stage.FAILED, error="worker a: last words: \0\1")
    key = StoredKey(KeyId("k1"), 1, RestingKey("kek", b"wrapped"), 1.5, left)
    store.commit(job, failed, [Note("job_failed", 1, failed.error)], epoch, 2.0, [key])
    assert store.get(job.id, EVERYTHING) == failed
    assert store.events(job.id, 1, 10, EVERYTHING)[0].message == "worker a: last words: \ufffd\1"
    assert store.keys(job.id) == [replace(key, reason=left[:200])]


def test_a_database_that_is_away_is_told_and_found_again(postgres_server, opened):
    store = SqlStore(opened())
    epoch = store.acquire("me", 1.0)
    store.insert(new_job(), None, NOTE, epoch, 1.0)
    postgres_server.stop()
    try:
        with pytest.raises(UnavailableError, match="the database does not answer"):
            store.get(JobId("j1"), EVERYTHING)
        with pytest.raises(UnavailableError, match="the database does not answer"):
            store.insert(replace(new_job(), id=JobId("j2")), None, NOTE, epoch, 1.0)
    finally:
        postgres_server.start()
    assert store.get(JobId("j1"), EVERYTHING) == new_job(), "what was acknowledged has survived"
    assert store.get(JobId("j2"), EVERYTHING) is None
