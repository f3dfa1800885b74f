"""Blobs and durable files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cortex_common.errors import CorruptError, OverloadedError
from cortex_common.storage import BlobStore, DirectoryBlobStore
from cortex_common.storage.durable import (
    reporting_full,
    reporting_unreadable,
    require_room,
    sync_file,
    write_durably,
)
from tests.conformance.blob_store import BlobStoreConformance


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """What the suite is run on here."""
    return DirectoryBlobStore(tmp_path / "blobs")


class TestDirectory(BlobStoreConformance):
    """Files."""


def test_an_empty_folder_goes(store: BlobStore, tmp_path: Path) -> None:
    store.put("job/1", b"x")
    store.sweep("job", ())
    assert not (tmp_path / "blobs" / "job").exists()


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
