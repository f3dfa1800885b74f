"""Data keys in SQL, as part of the transactions of `sql_store`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from cortex_common.ids import JobId, KeyId
from cortex_common.security.keyring import RestingKey
from services.coordinator.store import StoredKey
from services.coordinator.tables import DATA_KEY


def add(db: Connection, job_id: JobId, keys: Sequence[StoredKey]) -> None:
    """Store new keys."""
    if keys:
        db.execute(insert(DATA_KEY), [_row(job_id, key) for key in keys])


def of_job(db: Connection, job_id: JobId) -> list[StoredKey]:
    """The job's, oldest first."""
    rows = db.execute(select(DATA_KEY).where(DATA_KEY.c.job_id == job_id).order_by(DATA_KEY.c.epoch)).all()
    return [_stored(row) for row in rows]


def _row(job_id: JobId, key: StoredKey) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "epoch": key.epoch,
        "key_id": key.key_id,
        "kek_id": key.resting.kek_id,
        "wrapped": key.resting.wrapped,
        "created_s": key.created_s,
        "reason": key.reason,
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
