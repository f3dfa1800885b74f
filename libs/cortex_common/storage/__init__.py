"""Durable files and blobs."""

from __future__ import annotations

from cortex_common.storage.blobs import BlobReader, BlobStore, BlobWriter, DirectoryBlobStore

__all__ = ["BlobReader", "BlobStore", "BlobWriter", "DirectoryBlobStore"]
