"""Large immutable objects by name: sealed model versions now, checkpoints and shards later."""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from cortex_common.errors import InvalidArgumentError, NotFoundError
from cortex_common.storage.durable import (
    EARLY_BYTES,
    begin_sync,
    directory_syncer,
    make_directory,
    reporting_full,
    reporting_unreadable,
    set_aside,
    sync_directory,
    sync_file,
    sync_together,
    write_fully,
)

_TEMPORARY = ".tmp"
_PIECE_BYTES = 4 << 20
# Another file system, or one that knows no second name of a file, or no more of them.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})


class BlobWriter(Protocol):
    """A blob being written; nobody sees it before `commit`. Leaving the block without it discards everything."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def write(self, data: bytes | memoryview) -> None:
        """Append. OverloadedError: the store is full."""

    def commit(self, *, sync: bool = True) -> None:
        """Make it visible under its name, replacing an older blob, and durable; without `sync`, `publish` does that."""

    def sync(self) -> None:
        """Wait until what was written is durable. OverloadedError: the store is full."""


class BlobReader(Protocol):
    """An open blob."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    @property
    def size(self) -> int:
        """Length in bytes."""

    def read_at(self, offset: int, size: int) -> bytes:
        """A range; shorter only at the end. Threads may call it at the same time. CorruptError: the medium failed."""

    def close(self) -> None:
        """Give it up."""


class BlobStore(Protocol):
    """Where blobs live. Names are relative paths with '/'."""

    def create(self, name: str) -> BlobWriter:
        """Begin a blob."""

    def adopt(self, name: str, path: Path) -> BlobWriter:
        """Begin a blob with what a local file holds; the file stays, and may only be removed from now on.

        Raises:
            OverloadedError: the store is full.
        """

    def open(self, name: str) -> BlobReader:
        """Open one. NotFoundError: there is none of that name."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small one in one go."""

    def publish(self, name: str, data: bytes, parts: Sequence[BlobWriter]) -> None:
        """Make `parts` durable under their names, and only then write a small blob that names them.

        Raises:
            OverloadedError: the store is full; there is no new blob `name`.
        """

    def delete(self, name: str) -> bool:
        """Remove one; False if there was none."""

    def names(self, prefix: str) -> Iterator[str]:
        """Names that begin with `prefix`, which ends at a '/', in order."""

    def set_aside(self, name: str) -> str:
        """Rename one that cannot be read to `<name>.damaged`; where that lies, for people."""

    def sweep(self, folder: str, keep: Container[str]) -> None:
        """Remove durably all below a folder but these, and the folder with the last of them. Nobody may write there."""


class DirectoryBlobStore:
    """Blobs as files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        make_directory(root)

    def create(self, name: str) -> BlobWriter:
        """Begin a blob beside its final name."""
        path = self._path(name)
        make_directory(path.parent)
        return _FileWriter(path)

    def adopt(self, name: str, path: Path) -> BlobWriter:
        """Give the file a second name where that can be done, so that nothing is copied."""
        target = self._path(name)
        make_directory(target.parent)
        try:
            return _FileWriter(target, path)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        return filled(self.create(name), path)

    def open(self, name: str) -> BlobReader:
        """Open a file."""
        path = self._path(name)
        try:
            return _FileReader(os.open(path, os.O_RDONLY), path)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: there is no such blob") from error

    def put(self, name: str, data: bytes) -> None:
        """Write a small file durably."""
        with self.create(name) as writer:
            writer.write(data)
            writer.commit()

    def publish(self, name: str, data: bytes, parts: Sequence[BlobWriter]) -> None:
        """Sync everything at once, then rename the small file."""
        with self.create(name) as writer:
            writer.write(data)
            for part in parts:
                part.commit(sync=False)
            folder = self._path(name).parent
            with reporting_full(folder, 0):
                sync_together(writer.sync, *(part.sync for part in parts), directory_syncer(folder))
            writer.commit()

    def delete(self, name: str) -> bool:
        """Remove a file."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def names(self, prefix: str) -> Iterator[str]:
        """All files below a folder; temporaries of a killed process are removed on the way."""
        folder = self._path(prefix) if prefix else self._root
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and path.suffix == _TEMPORARY:
                path.unlink(missing_ok=True)
            elif path.is_file():
                yield path.relative_to(self._root).as_posix()

    def set_aside(self, name: str) -> str:
        """Rename a file."""
        return str(set_aside(self._path(name)))

    def sweep(self, folder: str, keep: Container[str]) -> None:
        """Remove files, then the folder if it is empty."""
        path = self._path(folder)
        if not path.is_dir():
            return
        for name in self.names(f"{folder}/"):
            if name not in keep:
                self.delete(name)
        sync_directory(path)
        with suppress(OSError):
            path.rmdir()
            sync_directory(path.parent)

    def _path(self, name: str) -> Path:
        return self._root.joinpath(*checked_parts(name))


def checked_parts(name: str) -> list[str]:
    """The parts of a blob's name, or of a folder's with or without its last '/'.

    Raises:
        InvalidArgumentError: it leads out of the store, or is one that unfinished blobs have.
    """
    parts = name.rstrip("/").split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or name.endswith(_TEMPORARY):
        raise InvalidArgumentError(f"blob name {name!r}; allowed are relative paths without '..'")
    return parts


def filled(writer: BlobWriter, path: Path) -> BlobWriter:
    """The writer, with what a file holds written to it; given up when that fails."""
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                writer.write(piece)
    except BaseException as error:
        writer.__exit__(type(error), error, error.__traceback__)
        raise
    return writer


class _FileWriter:
    def __init__(self, path: Path, adopted: Path | None = None) -> None:
        """Begin an empty file, or one that has another name already."""
        self._path = path
        self._temporary = path.with_name(path.name + _TEMPORARY)
        flags = os.O_WRONLY
        if adopted is None:
            flags |= os.O_CREAT | os.O_TRUNC
        else:
            self._temporary.unlink(missing_ok=True)
            os.link(adopted, self._temporary)
        self._file: int | None = os.open(self._temporary, flags, 0o600)
        self._visible = False
        self._synced = False
        self._unsent_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._visible:
            self._temporary.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None  # noqa: S101 - written inside its block, before commit
        self._synced = False
        with reporting_full(self._path.parent, len(data)):
            write_fully(self._file, data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes >= EARLY_BYTES:
            begin_sync(self._file)
            self._unsent_bytes = 0

    def commit(self, *, sync: bool = True) -> None:
        if sync and not self._synced:
            self.sync()
        self._temporary.replace(self._path)
        # Two names of one file are left alone by a rename.
        self._temporary.unlink(missing_ok=True)
        self._visible = True
        if sync:
            self._close()
            sync_directory(self._path.parent)

    def sync(self) -> None:
        assert self._file is not None  # noqa: S101 - synced inside its block
        with reporting_full(self._path.parent, 0):
            sync_file(self._file, self._path)
        self._synced = True

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _FileReader:
    def __init__(self, file: int, path: Path) -> None:
        self._file = file
        self._path = path
        self.size = os.fstat(file).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_at(self, offset: int, size: int) -> bytes:
        with reporting_unreadable(self._path):
            return os.pread(self._file, size, offset)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
