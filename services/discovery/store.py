"""Where the membership survives a restart: a snapshot, read once at the start and replaced as a whole."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from cortex_common.errors import CorruptError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from services.discovery.domain import Announcement, Remembered


class SnapshotStore(Protocol):
    """Keeps the last snapshot of the membership."""

    def load(self) -> tuple[Remembered, ...]:
        """The last snapshot; empty if there is none.

        Raises:
            CorruptError: there is one, and it cannot be read.
        """

    def save(self, nodes: Sequence[Remembered]) -> None:
        """Replace the snapshot.

        Raises:
            OSError, UnavailableError: it could not be written; the previous one is untouched.
        """


class MemorySnapshotStore:
    """Keeps the snapshot for as long as the process lives: tests, and networks that need no memory."""

    def __init__(self) -> None:
        self._nodes: tuple[Remembered, ...] = ()

    def load(self) -> tuple[Remembered, ...]:
        """The last snapshot."""
        return self._nodes

    def save(self, nodes: Sequence[Remembered]) -> None:
        """Replace the snapshot."""
        self._nodes = tuple(nodes)


class _StoredNode(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Role
    region: str
    address: str
    incarnation: str
    description: str
    seen_wall_s: float
    expired_wall_s: float | None


class _Snapshot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    nodes: tuple[_StoredNode, ...]


class FileSnapshotStore:
    """Keeps the snapshot in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> tuple[Remembered, ...]:
        """The last snapshot; empty if there is none.

        Raises:
            CorruptError: the file cannot be read.
        """
        try:
            snapshot = _Snapshot.model_validate_json(self._path.read_bytes())
            return tuple(_remembered(node) for node in snapshot.nodes)
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, ValidationError) as error:
            raise CorruptError(f"node snapshot {self._path}: {' '.join(str(error).split())}") from None

    def save(self, nodes: Sequence[Remembered]) -> None:
        """Replace the file as a whole: at any instant it holds the old snapshot or the new one.

        Raises:
            OSError: it could not be written; the previous one is untouched.
        """
        content = _Snapshot(nodes=tuple(_stored(node) for node in nodes)).model_dump_json().encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.new")
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _stored(item: Remembered) -> _StoredNode:
    node = item.node
    return _StoredNode(
        name=node.name,
        role=node.role,
        region=node.region,
        address=node.address,
        incarnation=node.incarnation,
        description=base64.b64encode(node.description).decode(),
        seen_wall_s=item.seen_wall_s,
        expired_wall_s=item.expired_wall_s,
    )


def _remembered(node: _StoredNode) -> Remembered:
    announcement = Announcement(
        name=NodeName(node.name),
        role=node.role,
        region=node.region,
        address=node.address,
        incarnation=node.incarnation,
        description=base64.b64decode(node.description, validate=True),
    )
    return Remembered(announcement, node.seen_wall_s, node.expired_wall_s)
