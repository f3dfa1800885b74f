"""Data keys in SQL, as part of the transactions of `sql_store`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, literal, select, tuple_, update

from cortex_common.ids import JobId, KeyId
from cortex_common.security.keyring import RestingKey
from services.coordinator.store import OwnedKey, StoredKey
from services.coordinator.tables import DATA_KEY, MAX_REASON


def add(db: Connection, job_id: JobId, keys: Sequence[StoredKey]) -> None:
    """Store new keys."""
    if keys:
        db.execute(insert(DATA_KEY), [_row(job_id, key) for key in keys])


def of_job(db: Connection, job_id: JobId) -> list[StoredKey]:
    """The job's, oldest first."""
    rows = db.execute(select(DATA_KEY).where(DATA_KEY.c.job_id == job_id).order_by(DATA_KEY.c.epoch)).all()
    return [_stored(row) for row in rows]


def erase(db: Connection, job_id: JobId, numbers: frozenset[int]) -> list[int]:
    """Take the bytes of these epochs' keys; the numbers of those that still had any."""
    held = (DATA_KEY.c.job_id == job_id) & (DATA_KEY.c.wrapped != b"")
    epochs = db.execute(select(DATA_KEY.c.epoch).where(held).order_by(DATA_KEY.c.epoch)).scalars().all()
    gone = [number for number in epochs if number in numbers]
    if gone:
        db.execute(update(DATA_KEY).where(held & DATA_KEY.c.epoch.in_(gone)).values(wrapped=b""))
    return gone


def under_others(db: Connection, kek_id: str, after: tuple[JobId, int] | None, limit: int) -> list[OwnedKey]:
    """A page of what does not rest under this key-encryption key."""
    found = select(DATA_KEY).where((DATA_KEY.c.kek_id != kek_id) & (DATA_KEY.c.wrapped != b""))
    if after is not None:
        found = found.where(tuple_(DATA_KEY.c.job_id, DATA_KEY.c.epoch) > tuple_(*map(literal, after)))
    rows = db.execute(found.order_by(DATA_KEY.c.job_id, DATA_KEY.c.epoch).limit(limit)).all()
    return [(JobId(row.job_id), _stored(row)) for row in rows]


def rewrap(db: Connection, job_id: JobId, key: StoredKey, resting: RestingKey) -> int:
    """Replace how one rests, unless it has changed since it was read; 1 if it was done."""
    same = (DATA_KEY.c.job_id == job_id) & (DATA_KEY.c.epoch == key.epoch) & (DATA_KEY.c.wrapped == key.resting.wrapped)
    return db.execute(update(DATA_KEY).where(same).values(kek_id=resting.kek_id, wrapped=resting.wrapped)).rowcount


def kek_ids(db: Connection) -> frozenset[str]:
    """Under which something rests."""
    held = select(DATA_KEY.c.kek_id).where(DATA_KEY.c.wrapped != b"").distinct()
    return frozenset(db.execute(held).scalars())


def _row(job_id: JobId, key: StoredKey) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "epoch": key.epoch,
        "key_id": key.key_id,
        "kek_id": key.resting.kek_id,
        "wrapped": key.resting.wrapped,
        "created_s": key.created_s,
        "reason": key.reason[:MAX_REASON],
        "from_round": key.from_round,
        "from_attempt": key.from_attempt,
    }


def _stored(row: Row[Any]) -> StoredKey:
    return StoredKey(
        key_id=KeyId(row.key_id),
        epoch=row.epoch,
        resting=RestingKey(row.kek_id, bytes(row.wrapped)),
        created_s=row.created_s,
        reason=row.reason,
        from_round=row.from_round,
        from_attempt=row.from_attempt,
    )
