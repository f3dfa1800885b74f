"""One suite for every snapshot store, and what is special to the file."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cortex_common.errors import CorruptError
from cortex_common.storage.sql import open_engine, sqlite_url
from services.discovery.sql_store import SqlSnapshotStore
from services.discovery.store import FileSnapshotStore, MemorySnapshotStore
from services.discovery.tables import METADATA, REVISION_TABLE
from tests.conformance.snapshot_store import NODES, SnapshotStoreConformance


@pytest.fixture(params=["memory", "file", "sqlite"])
def store(request, tmp_path):
    return {
        "memory": MemorySnapshotStore,
        "file": lambda: FileSnapshotStore(tmp_path / "a" / "nodes.json"),
        "sqlite": lambda: SqlSnapshotStore(open_engine(sqlite_url(tmp_path / "nodes.db"))),
    }[request.param]()


class TestStores(SnapshotStoreConformance):
    """Those that need no server."""


def test_the_migrations_give_the_table_the_code_uses(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "nodes.db"))
    SqlSnapshotStore(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": REVISION_TABLE})
        assert compare_metadata(context, METADATA) == []


def test_a_row_of_an_unknown_role_is_corrupt(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "nodes.db"))
    store = SqlSnapshotStore(engine)
    store.save(NODES)
    with engine.begin() as db:
        db.exec_driver_sql("UPDATE discovery_node SET role = 'king'")
    with pytest.raises(CorruptError, match="discovery_node"):
        store.load()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"nodes": [{"name": "x"}]}', '{"nodes": [], "more": 1}'])
def test_an_unreadable_file_is_corrupt_and_named(tmp_path, content):
    path = tmp_path / "nodes.json"
    path.write_text(content)
    with pytest.raises(CorruptError, match=r"nodes\.json"):
        FileSnapshotStore(path).load()


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "nodes.json"
    FileSnapshotStore(path).save(NODES)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            FileSnapshotStore(path).load()


def test_a_failed_write_leaves_the_old_snapshot(tmp_path):
    path = tmp_path / "nodes.json"
    store = FileSnapshotStore(path)
    store.save(NODES)
    (tmp_path / "nodes.json.new").mkdir()  # the draft cannot be written
    with pytest.raises(OSError, match=r"nodes\.json\.new"):
        store.save(())
    assert store.load() == NODES
