"""What every blob store does; a test module inherits it and gives the fixture `store`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.storage import BlobStore


class BlobStoreConformance:
    """The suite."""

    def test_a_blob_is_seen_once_committed(self, store: BlobStore) -> None:
        with store.create("job/1.blob") as writer:
            writer.write(b"hello ")
            writer.write(memoryview(b"world"))
            assert list(store.names("")) == []
        with pytest.raises(NotFoundError):
            store.open("job/1.blob")
        with store.create("job/1.blob") as writer:
            writer.write(b"hello ")
            writer.write(memoryview(b"world"))
            writer.commit()
        assert list(store.names("job/")) == list(store.names("")) == ["job/1.blob"]
        with store.open("job/1.blob") as reader:
            assert reader.size == 11
            assert reader.read_at(6, 100) == b"world"

    def test_a_blob_is_replaced_whole_and_deleted(self, store: BlobStore) -> None:
        store.put("a", b"old")
        with store.open("a") as before:
            store.put("a", b"newer")
            with suppress(CorruptError):  # a store that keeps no old bytes says so
                assert before.read_at(0, 10) == b"old"
        with store.open("a") as after:
            assert after.read_at(0, 10) == b"newer"
        assert store.delete("a")
        assert not store.delete("a")

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a.tmp", "a\0b"])
    def test_names_that_leave_the_store_are_refused(self, store: BlobStore, name: str) -> None:
        with pytest.raises(InvalidArgumentError):
            store.create(name)

    def test_a_swept_folder_keeps_what_is_named_and_goes_when_it_is_empty(self, store: BlobStore) -> None:
        for name in ("job/1", "job/2", "other/1"):
            store.put(name, b"x")
        store.sweep("job", {"job/2"})
        assert list(store.names("")) == ["job/2", "other/1"]
        store.sweep("job", ())
        store.sweep("job", ())
        assert list(store.names("")) == ["other/1"]

    def test_what_cannot_be_read_is_set_aside(self, store: BlobStore) -> None:
        for content in (b"first", b"second"):
            store.put("job/1", content)
            assert store.set_aside("job/1").endswith("job/1.damaged")
        assert list(store.names("")) == ["job/1.damaged"]
        with store.open("job/1.damaged") as reader:
            assert reader.read_at(0, 10) == b"second"

    def test_any_range_of_a_large_blob_is_read_as_written(self, store: BlobStore) -> None:
        content = bytes(range(256)) * (3 << 12)
        with store.create("job/large") as writer:
            for start in range(0, len(content), 1 << 20):
                writer.write(content[start : start + (1 << 20)])
            writer.sync()
            with pytest.raises(NotFoundError):
                store.open("job/large")
            writer.commit()
        with store.open("job/large") as reader:
            assert reader.size == len(content)
            for offset, size in ((0, 1), (255, 514), (len(content) - 3, 10), (len(content), 1), (len(content) + 9, 1)):
                assert reader.read_at(offset, size) == content[offset : offset + size]

    def test_a_file_becomes_a_blob_and_stays(self, store: BlobStore, tmp_path: Path) -> None:
        content, path = bytes(range(256)) * (5 << 12), tmp_path / "file"
        path.write_bytes(content)
        with store.adopt("job/given-up", path):
            assert list(store.names("")) == []
        assert list(store.names("")) == []
        for _ in range(2):
            with store.adopt("job/blob", path) as writer:
                store.publish("job/facts", b"{}", [writer])
        path.unlink()
        assert list(store.names("")) == ["job/blob", "job/facts"]
        with store.open("job/blob") as reader:
            assert reader.read_at(0, len(content) + 1) == content

    def test_a_published_blob_is_there_with_its_parts(self, store: BlobStore) -> None:
        with store.create("job/part") as part, store.create("job/empty") as empty:
            part.write(b"part")
            store.publish("job/facts", b"{}", [part, empty])
        assert list(store.names("job/")) == ["job/empty", "job/facts", "job/part"]
        with store.open("job/empty") as reader:
            assert reader.size == 0

    def test_names_begin_with_a_whole_folder(self, store: BlobStore) -> None:
        for name in ("job/1", "job-2/1", "job/2"):
            store.put(name, b"x")
        assert list(store.names("job/")) == ["job/1", "job/2"]
        assert list(store.names("none/")) == []
