"""Files that survive a kill and a power cut: written aside, synced, renamed, the directory synced."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from cortex_common.errors import CorruptError, OverloadedError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNREADABLE = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
DAMAGED = ".damaged"
"""Ending of the names of what has been set aside."""
EARLY_BYTES = 4 * 1024 * 1024
"""How much of a large file is written before the disk is told to begin with it."""
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNCING = ThreadPoolExecutor(16, thread_name_prefix="sync")


def free_bytes(directory: Path) -> int:
    """Bytes that may still be written below an existing directory."""
    return shutil.disk_usage(directory).free


def require_room(directory: Path, needed_bytes: int, reserve_bytes: int = 0) -> None:
    """Check before the first byte that something fits.

    Raises:
        OverloadedError: names the directory, what is free and what is needed.
    """
    free = free_bytes(directory)
    if free - reserve_bytes < needed_bytes:
        reserve = f", {reserve_bytes} of them are kept in reserve" if reserve_bytes else ""
        raise OverloadedError(f"{directory}: {needed_bytes} bytes are needed, {free} are free{reserve}")


@contextmanager
def reporting_full(directory: Path, needed_bytes: int) -> Iterator[None]:
    """Turn "no space left" inside the block into an OverloadedError that names directory, free bytes and need."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OverloadedError(
            f"{directory}: no room for {needed_bytes} bytes, {free_bytes(directory)} are free "
            f"({os.strerror(error.errno)})"
        ) from error


@contextmanager
def reporting_unreadable(path: Path) -> Iterator[None]:
    """Turn a medium's read error inside the block into a CorruptError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise CorruptError(f"{path} is not readable: {os.strerror(error.errno)}") from error


def set_aside(path: Path) -> Path:
    """Rename what cannot be read to `<name>.damaged`, out of the way but there for a person to look at."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.is_dir():
        shutil.rmtree(aside)
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def sync_file(descriptor: int, what: Path) -> None:
    """Wait until a file's data is on the disk.

    Raises:
        OSError: the disk is full (found out late).
        SystemExit: any other failure: what the kernel has dropped by then nobody knows, so the process must not go on.
    """
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise SystemExit(
            f"{what}: the disk failed to sync: {error}; stopping before anything is acknowledged"
        ) from error


def begin_sync(descriptor: int) -> None:
    """Let the disk begin with what a file has, so that a later `sync_file` waits less; promises nothing by itself."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_file(descriptor, directory)
    finally:
        os.close(descriptor)


def sync_together(first: Callable[[], None], *others: Callable[[], None]) -> None:
    """Sync several files and directories at once: a journalling file system commits them together.

    Raises:
        OSError: a disk is full.
        SystemExit: as `sync_file`.
    """
    running = [_SYNCING.submit(each) for each in others]
    try:
        first()
    finally:
        failures = [running_one.exception() for running_one in running]
    for failure in filter(None, failures):
        raise failure


def file_syncer(descriptor: int, what: Path) -> Callable[[], None]:
    """`sync_file`, for `sync_together`."""
    return partial(sync_file, descriptor, what)


def directory_syncer(directory: Path) -> Callable[[], None]:
    """`sync_directory`, for `sync_together`."""
    return partial(sync_directory, directory)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file in one step: afterwards it holds `data`, or what it held before.

    Raises:
        OverloadedError: the disk is full; nothing half-written is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with reporting_full(path.parent, len(data)), open_new(temporary, mode) as file:
            write_fully(file.fileno(), data)
            sync_file(file.fileno(), temporary)
    except OverloadedError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_directory(path.parent)


def open_new(path: Path, mode: int = 0o644) -> BinaryIO:
    """An empty file, unbuffered, with these rights from its first moment on."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb", buffering=0)


def write_fully(descriptor: int, data: bytes | memoryview) -> None:
    """Write everything at the file's position, however many calls that takes."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)
