"""One suite for every snapshot store, and what is special to the file."""

from __future__ import annotations

import pytest

from cortex_common.errors import CorruptError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from services.discovery.domain import Announcement, Remembered
from services.discovery.store import FileSnapshotStore, MemorySnapshotStore

NODES = (
    Remembered(Announcement(NodeName("w1"), Role.WORKER, "eu", "", "i1", b"\x00\xff\n"), 12.5, None),
    Remembered(Announcement(NodeName("a1"), Role.AGGREGATOR, "us", "h:1", "i2", b""), 1.0, 2.0),
)


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    return MemorySnapshotStore() if request.param == "memory" else FileSnapshotStore(tmp_path / "a" / "nodes.json")


def test_an_unwritten_store_is_empty(store):
    assert store.load() == ()


def test_what_was_saved_is_loaded(store):
    store.save(NODES)
    assert store.load() == NODES


def test_the_last_snapshot_counts(store):
    store.save(NODES)
    store.save(NODES[:1])
    assert store.load() == NODES[:1]
    store.save(())
    assert store.load() == ()


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
