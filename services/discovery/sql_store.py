"""The snapshot in SQL: for networks whose discovery must find it again on another machine."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, delete, insert, select

from cortex_common.errors import CorruptError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from cortex_common.storage.sql import migrate
from services.discovery.domain import Announcement, Remembered
from services.discovery.tables import NODE


class SqlSnapshotStore:
    """Implements SnapshotStore: one row a node. Opens with the schema brought up to date."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        migrate(engine, "services.discovery:migrations")

    def load(self) -> tuple[Remembered, ...]:
        """The last snapshot; empty if there is none.

        Raises:
            CorruptError: a row cannot be read.
            UnavailableError: the database does not answer.
        """
        with self._engine.connect() as db:
            rows = db.execute(select(NODE).order_by(NODE.c.name)).all()
        try:
            return tuple(
                Remembered(
                    Announcement(
                        name=NodeName(row.name),
                        role=Role(row.role),
                        region=row.region,
                        address=row.address,
                        incarnation=row.incarnation,
                        description=bytes(row.description),
                    ),
                    row.seen_wall_s,
                    row.expired_wall_s,
                )
                for row in rows
            )
        except ValueError as error:
            raise CorruptError(f"table {NODE.name}: {error}") from None

    def save(self, nodes: Sequence[Remembered]) -> None:
        """Replace all rows in one transaction.

        Raises:
            UnavailableError: the database does not answer; the previous snapshot is untouched.
        """
        rows = [
            {
                "name": item.node.name,
                "role": item.node.role.value,
                "region": item.node.region,
                "address": item.node.address,
                "incarnation": item.node.incarnation,
                "description": item.node.description,
                "seen_wall_s": item.seen_wall_s,
                "expired_wall_s": item.expired_wall_s,
            }
            for item in nodes
        ]
        with self._engine.begin() as db:
            db.execute(delete(NODE))
            if rows:
                db.execute(insert(NODE), rows)
