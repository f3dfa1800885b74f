"""Blobs and durable files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError, OverloadedError
from cortex_common.storage import BlobStore, DirectoryBlobStore
from cortex_common.storage.durable import (
    reporting_full,
    reporting_unreadable,
    require_room,
    sync_file,
    write_durably,
)


@pytest.fixture(params=["directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """Every store there is; one suite for all."""
    return {"directory": lambda: DirectoryBlobStore(tmp_path / "blobs")}[request.param]()


def test_a_blob_is_seen_once_committed(store: BlobStore) -> None:
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


def test_a_blob_is_replaced_whole_and_deleted(store: BlobStore) -> None:
    store.put("a", b"old")
    with store.open("a") as before:
        store.put("a", b"newer")
        assert before.read_at(0, 10) == b"old"
    with store.open("a") as after:
        assert after.read_at(0, 10) == b"newer"
    assert store.delete("a")
    assert not store.delete("a")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a.tmp", "a\0b"])
def test_names_that_leave_the_store_are_refused(store: BlobStore, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        store.create(name)


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    store = DirectoryBlobStore(tmp_path)
    store.put("job/1", b"x")
    (tmp_path / "job" / "2.tmp").write_bytes(b"half")
    assert list(store.names("")) == ["job/1"]
    assert not (tmp_path / "job" / "2.tmp").exists()


def test_a_full_disk_is_told_with_directory_and_sizes(tmp_path: Path) -> None:
    told = pytest.raises(OverloadedError, match=rf"{tmp_path}: no room for 5 bytes, \d+ are free")
    with told, reporting_full(tmp_path, 5):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), reporting_full(tmp_path, 5):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(OverloadedError, match="bytes are needed"):
        require_room(tmp_path, 1 << 60)


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    write_durably(path, b"1")
    write_durably(path, b"2", mode=0o600)
    assert path.read_bytes() == b"2"
    assert [each.name for each in tmp_path.iterdir()] == ["facts"]


def test_a_swept_folder_keeps_what_is_named_and_goes_when_it_is_empty(store: BlobStore, tmp_path: Path) -> None:
    for name in ("job/1", "job/2", "other/1"):
        store.put(name, b"x")
    store.sweep("job", {"job/2"})
    assert list(store.names("")) == ["job/2", "other/1"]
    store.sweep("job", ())
    store.sweep("job", ())
    assert list(store.names("")) == ["other/1"]
    assert not (tmp_path / "blobs" / "job").exists()


def test_what_cannot_be_read_is_set_aside(store: BlobStore, tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        store.put("job/1", content)
        assert store.set_aside("job/1") == str(tmp_path / "blobs" / "job" / "1.damaged")
    assert list(store.names("")) == ["job/1.damaged"]
    with store.open("job/1.damaged") as reader:
        assert reader.read_at(0, 10) == b"second"


def test_a_medium_that_fails_is_told_from_other_errors(tmp_path: Path) -> None:
    told = pytest.raises(CorruptError, match=f"{tmp_path} is not readable")
    with told, reporting_unreadable(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(PermissionError), reporting_unreadable(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_failed_sync_ends_the_process(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(SystemExit, match="failed to sync"):
            sync_file(writing, tmp_path / "x")
    finally:
        os.close(reading)
        os.close(writing)
