"""Sealed data sets in SQL, as part of the transactions of `sql_store`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from cortex_common.security.keyring import RestingKey
from services.coordinator.store import StoredDataset
from services.coordinator.tables import DATASET


def add(db: Connection, dataset: StoredDataset) -> StoredDataset:
    """Store a new one; the earlier one when its digest is known already."""
    earlier = db.execute(select(DATASET).where(DATASET.c.digest == dataset.digest)).one_or_none()
    if earlier is not None:
        return _stored(earlier)
    row = asdict(dataset)
    del row["key"]
    db.execute(insert(DATASET).values(**row, kek_id=dataset.key.kek_id, wrapped=dataset.key.wrapped))
    return dataset


def every(db: Connection) -> list[StoredDataset]:
    """All, oldest first."""
    return [_stored(row) for row in db.execute(select(DATASET).order_by(DATASET.c.added_s, DATASET.c.digest))]


def remove(db: Connection, digest: str) -> bool:
    """Erase one with its key; False if there is none."""
    return db.execute(delete(DATASET).where(DATASET.c.digest == digest)).rowcount == 1


def rewrap(db: Connection, before: StoredDataset, resting: RestingKey) -> int:
    """Replace how a key rests, unless it has changed since it was read; 1 if it was done."""
    same = (DATASET.c.digest == before.digest) & (DATASET.c.wrapped == before.key.wrapped)
    return db.execute(update(DATASET).where(same).values(kek_id=resting.kek_id, wrapped=resting.wrapped)).rowcount


def kek_ids(db: Connection) -> frozenset[str]:
    """Under which something rests."""
    return frozenset(db.execute(select(DATASET.c.kek_id).distinct()).scalars())


def _stored(row: Row[Any]) -> StoredDataset:
    return StoredDataset(
        digest=row.digest,
        org=row.org,
        manifest=row.manifest,
        key=RestingKey(row.kek_id, bytes(row.wrapped)),
        added_s=row.added_s,
        added_by=row.added_by,
    )
