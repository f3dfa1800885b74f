"""IDX files, the format of the MNIST family: magic, sizes, then the values; gzip by name or by content."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cortex_common.errors import CorruptError, NotFoundError

Array = NDArray[Any]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMENSIONS = 4
_MAX_BYTES = 8 << 30


def read_idx(path: Path) -> Array:
    """The array in an IDX file, compressed or not.

    Raises:
        NotFoundError: no such file.
        CorruptError: not an IDX file, or shorter or longer than it says.
    """
    try:
        with _open(path) as stream:
            kind, shape = _header(path, stream)
            expected = math.prod(shape) * kind.itemsize
            data = stream.read(expected + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptError(f"{path}: cannot be read: {error}") from error
    if len(data) != expected:
        found = f"only {len(data)}" if len(data) < expected else "more"
        raise CorruptError(f"{path}: {found} bytes of values; its header says {expected} (shape {list(shape)})")
    return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)


def idx_shape(path: Path) -> tuple[int, ...]:
    """The shape an IDX file says it has, without reading the values.

    Raises:
        NotFoundError: no such file.
        CorruptError: not an IDX file.
    """
    try:
        with _open(path) as stream:
            return _header(path, stream)[1]
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    with path.open("rb") as stream:
        is_compressed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_compressed else path.open("rb")


def _header(path: Path, stream: BinaryIO | gzip.GzipFile) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= _MAX_DIMENSIONS:
        raise CorruptError(
            f"{path}: not an IDX file (starts with {magic.hex() or 'nothing'}; allowed: 0000, a type of "
            f"08 09 0b 0c 0d 0e, 1 to {_MAX_DIMENSIONS} dimensions)"
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise CorruptError(f"{path}: ends within its header")
    kind = np.dtype(_TYPES[magic[2]])
    shape = struct.unpack(f">{magic[3]}I", sizes)
    if math.prod(shape) * kind.itemsize > _MAX_BYTES:
        raise CorruptError(f"{path}: says it holds shape {list(shape)}; allowed are {_MAX_BYTES} bytes")
    return kind, shape
