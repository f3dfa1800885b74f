"""What every snapshot store of discovery does; a test module inherits it and gives the fixture `store`."""

from __future__ import annotations

from cortex_common.identity import Role
from cortex_common.ids import NodeName
from services.discovery.domain import Announcement, Remembered

NODES = (
    Remembered(Announcement(NodeName("a1"), Role.AGGREGATOR, "us", "h:1", "i2", b""), 1.0, 2.0),
    Remembered(Announcement(NodeName("w1"), Role.WORKER, "eu", "", "i1", b"\x00\xff\n"), 12.5, None),
)


class SnapshotStoreConformance:
    """The suite."""

    def test_an_unwritten_store_is_empty(self, store):
        assert store.load() == ()

    def test_what_was_saved_is_loaded(self, store):
        store.save(NODES)
        assert store.load() == NODES

    def test_the_last_snapshot_counts(self, store):
        store.save(NODES)
        store.save(NODES[:1])
        assert store.load() == NODES[:1]
        store.save(())
        assert store.load() == ()
