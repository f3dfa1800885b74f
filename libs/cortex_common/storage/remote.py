"""Blobs in an object store that speaks S3 (Amazon's, MinIO, SeaweedFS, Ceph …), through fsspec."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from cortex_common.storage.blobs import BlobReader, BlobWriter, checked_parts, filled
from cortex_common.storage.durable import DAMAGED

# Parts of an upload; S3 allows 10,000 of them, so a blob may have 160 GB.
_PART_BYTES = 16 * 1024 * 1024
_TRIES = 5


@dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach the object store.

    Attributes:
        endpoint: URL of the server; None for Amazon's.
        region: As the server names it.
        key_file: Holds the access key's id; None together with `secret_file` takes what the machine offers (AWS_*
            variables, instance roles).
        secret_file: Holds its secret.
    """

    endpoint: str | None = None
    region: str | None = None
    key_file: Path | None = None
    secret_file: Path | None = None

    def open(self) -> S3FileSystem:
        """A connection; nothing is sent yet.

        Raises:
            NotFoundError: a key file cannot be read.
        """
        return S3FileSystem(
            key=_secret(self.key_file),
            secret=_secret(self.secret_file),
            client_kwargs={"endpoint_url": self.endpoint, "region_name": self.region},
            config_kwargs={"retries": {"max_attempts": _TRIES, "mode": "standard"}, "connect_timeout": 5},
            use_listings_cache=False,
            default_block_size=_PART_BYTES,
            skip_instance_cache=True,
        )


class S3BlobStore:
    """Blobs as objects below `s3://bucket/prefix`. What S3 has acknowledged is durable and visible at once."""

    def __init__(self, url: str, access: S3Access) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise InvalidArgumentError(f"blob store {url!r} given; allowed is s3://bucket/prefix")
        self._root = f"{parts.netloc}{parts.path}".rstrip("/")
        self._files = access.open()

    def create(self, name: str) -> BlobWriter:
        """Begin an object: sent in parts meanwhile, there once it is complete."""
        path = self._path(name)
        with _reporting(path):
            return _ObjectWriter(self._files.open(path, "wb", autocommit=False), path)

    def adopt(self, name: str, path: Path) -> BlobWriter:
        """Send the file."""
        return filled(self.create(name), path)

    def open(self, name: str) -> BlobReader:
        """Open an object."""
        path = self._path(name)
        with _reporting(path):
            facts = self._files.info(path)
        return _ObjectReader(self._files, path, int(facts["size"]), str(facts["ETag"]))

    def put(self, name: str, data: bytes) -> None:
        """Write a small object in one request."""
        path = self._path(name)
        with _reporting(path):
            self._files.pipe_file(path, data)

    def publish(self, name: str, data: bytes, parts: Sequence[BlobWriter]) -> None:
        """Complete the parts, then write the small object."""
        for part in parts:
            part.commit()
        self.put(name, data)

    def delete(self, name: str) -> bool:
        """Remove an object."""
        path = self._path(name)
        with _reporting(path):
            if not self._files.exists(path):
                return False
            self._files.rm_file(path)
        return True

    def names(self, prefix: str) -> Iterator[str]:
        """All objects below a folder."""
        folder = self._path(prefix) if prefix else self._root
        with _reporting(folder):
            found = self._files.find(folder)
        # Some servers list a folder that has become empty as an object of its name.
        yield from sorted(path.removeprefix(f"{self._root}/") for path in found if path.startswith(f"{folder}/"))

    def set_aside(self, name: str) -> str:
        """Copy an object to its other name, then remove it."""
        path = self._path(name)
        with _reporting(path):
            self._files.cp_file(path, path + DAMAGED)
            self._files.rm_file(path)
        return f"s3://{path}{DAMAGED}"

    def sweep(self, folder: str, keep: Container[str]) -> None:
        """Remove objects; S3 has no folders."""
        for name in list(self.names(f"{folder}/")):
            if name not in keep:
                self.delete(name)

    def _path(self, name: str) -> str:
        return "/".join([self._root, *checked_parts(name)])


class _ObjectWriter:
    """An upload in parts; S3 shows nothing of it before its completion."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path
        self._complete = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._complete:
            with suppress(UnavailableError), _reporting(self._path):
                self._file.discard()
            self._file.closed = True

    def write(self, data: bytes | memoryview) -> None:
        with _reporting(self._path):
            self._file.write(bytes(data))

    def commit(self, *, sync: bool = True) -> None:
        self.sync()
        with _reporting(self._path):
            self._file.commit()
        self._complete = True

    def sync(self) -> None:
        with _reporting(self._path):
            self._file.close()


class _ObjectReader:
    """Ranges of one object; never a mixture of two of the same name."""

    def __init__(self, files: S3FileSystem, path: str, size: int, tag: str) -> None:
        self._files = files
        self._path = path
        self._tag = tag
        self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_at(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        with _reporting(self._path):
            data: bytes = sync(self._files.loop, self._range, f"bytes={offset}-{end - 1}")
        return data

    def close(self) -> None:
        """Nothing is held open."""

    async def _range(self, wanted: str) -> bytes:
        """As `cat_file` does, and only of the object that was opened."""
        bucket, _, key = self._path.partition("/")
        answer = await self._files._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, IfMatch=self._tag)
        async with answer["Body"] as body:
            return bytes(await body.read())


@contextmanager
def _reporting(path: str) -> Iterator[None]:
    """Turn what S3 answers inside the block into this project's errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"s3://{path}: there is no such blob, or no such bucket") from error
    except PermissionError as error:
        raise UnavailableError(f"s3://{path}: the object store refuses: {error}") from error
    except (OSError, BotoCoreError, ClientError) as error:
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
            raise CorruptError(f"s3://{path}: was replaced while it was read") from error
        raise UnavailableError(f"s3://{path}: the object store does not answer: {error}") from error


def _secret(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise NotFoundError(f"S3 key file {path} cannot be read: {error.strerror or error}") from error
