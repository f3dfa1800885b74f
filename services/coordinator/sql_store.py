"""The store in SQL: SQLite by default."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Row,
    bindparam,
    delete,
    desc,
    func,
    insert,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError

from cortex_common.errors import ConflictError, CorruptError
from cortex_common.ids import JobId, NodeName, SeatIndex, Sha256Hex
from cortex_common.job.status import RoundReport
from cortex_common.logging import get_logger
from cortex_common.security.keyring import RestingKey
from cortex_common.storage.sql import migrate
from services.coordinator import sql_datasets, sql_keys
from services.coordinator.domain.job import Contribution, Job, Note, Stage, Version
from services.coordinator.domain.reach import Reach
from services.coordinator.store import OwnedKey, StoredDataset, StoredEvent, StoredKey, StoredVersion
from services.coordinator.tables import CONTRIBUTION, EVENT, JOB, LEASE, ROUND, VERSION

log = get_logger(__name__)

_JOB = TypeAdapter(Job)
_TERMINAL = [stage.value for stage in Stage if stage.is_terminal]

# What each step of a round runs is built once: building a statement costs more than SQLite takes to carry it out.
# Shared lock (where the database has any): nobody takes the lease between this look and the commit.
_EPOCH = select(LEASE.c.epoch).where(LEASE.c.id == 1).with_for_update(read=True)
_LAST_EVENT = select(func.max(EVENT.c.sequence)).where(EVENT.c.job_id == bindparam("job"))
_OF_ROUND = (CONTRIBUTION.c.job_id == bindparam("job")) & (CONTRIBUTION.c.round == bindparam("of_round"))
_DROP_CONTRIBUTIONS = delete(CONTRIBUTION).where(_OF_ROUND)
_SET_JOB = update(JOB).where(JOB.c.id == bindparam("job")).values(revision=JOB.c.revision + 1)
_SET_RUNNING_JOB = _SET_JOB.where(JOB.c.stage.not_in(_TERMINAL))
_SET_ENDED_JOB = _SET_JOB.where(JOB.c.stage == bindparam("ended_as"))
_ADD_ROUND, _ADD_EVENT, _ADD_CONTRIBUTION = insert(ROUND), insert(EVENT), insert(CONTRIBUTION)
_ADD_VERSION = insert(VERSION)


class SqlStore:
    """Implements Store. Opens with the schema brought up to date."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        migrate(engine, "services.coordinator:migrations")

    def acquire(self, holder: str, now_s: float) -> int:
        """Become the writer; gives the new epoch, or raises ConflictError when another did at this very moment."""
        with self._engine.begin() as db:
            current = db.execute(select(LEASE.c.epoch).where(LEASE.c.id == 1).with_for_update()).scalar()
            epoch = (current or 0) + 1
            values = {"epoch": epoch, "holder": holder, "acquired_s": now_s}
            if current is None:
                # No row to lock yet: of two that are first, one is.
                try:
                    db.execute(insert(LEASE).values(id=1, **values))
                except IntegrityError:
                    raise ConflictError("another coordinator has just taken the lease") from None
            else:
                db.execute(update(LEASE).where(LEASE.c.id == 1).values(**values))
        return epoch

    def insert(
        self,
        job: Job,
        request_id: str | None,
        note: Note,
        epoch: int,
        now_s: float,
        keys: Sequence[StoredKey] = (),
    ) -> JobId:
        """Store a new job and its keys; the id of the earlier one when `request_id` was used before."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            if request_id is not None:
                earlier = db.execute(select(JOB.c.id).where(JOB.c.request_id == request_id)).scalar()
                if earlier is not None:
                    return JobId(earlier)
            row = _job_row(job) | {"id": job.id, "request_id": request_id, "revision": 1}
            db.execute(insert(JOB).values(**row))
            sql_keys.add(db, job.id, keys)
            _append(db, job.id, [note], epoch, now_s)
        return job.id

    def find_request(self, request_id: str) -> JobId | None:
        """The job that was submitted under this id."""
        with self._engine.connect() as db:
            found = db.execute(select(JOB.c.id).where(JOB.c.request_id == request_id)).scalar()
        return None if found is None else JobId(found)

    def commit(
        self, before: Job, after: Job, notes: Sequence[Note], epoch: int, now_s: float, keys: Sequence[StoredKey] = ()
    ) -> None:
        """Replace `before` by `after`, with everything that follows from the difference, or raise ConflictError."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            row = _job_row(after) | {"job": after.id}
            if before.stage.is_terminal:
                changed = db.execute(_SET_ENDED_JOB, row | {"ended_as": after.stage.value})
            else:
                changed = db.execute(_SET_RUNNING_JOB, row)
            if changed.rowcount != 1:
                raise ConflictError(f"job {after.id} has ended already")
            sql_keys.add(db, after.id, keys)
            _write_contributions(db, before, after)
            _write_version(db, before, after)
            _add(db, _ADD_ROUND, [_report_row(after.id, report) for report in after.history[len(before.history) :]])
            _append(db, after.id, notes, epoch, now_s)

    def get(self, job_id: JobId, reach: Reach) -> Job | None:
        """The job with its history, if it is within reach."""
        with self._engine.connect() as db:
            state = db.execute(select(JOB.c.state).where(JOB.c.id == job_id, _within(reach))).scalar()
            if state is None:
                return None
            job = _readable(state)
            if job is None:
                raise CorruptError(f"job {job_id}: its stored state is not readable")
            return _with_history(db, job)

    def unfinished(self) -> list[Job]:
        """Jobs that have not ended or not been cleaned up, oldest first."""
        wanted = JOB.c.stage.not_in(_TERMINAL) | (JOB.c.cleaned == 0)
        with self._engine.connect() as db:
            states = db.execute(select(JOB.c.state).where(wanted).order_by(JOB.c.submitted_s)).scalars().all()
            return [job for state in states if (job := _whole(db, state)) is not None]

    def newest(self, limit: int, reach: Reach) -> list[Job]:
        """Jobs within reach without their history, newest first."""
        newest = select(JOB.c.state).where(_within(reach)).order_by(desc(JOB.c.submitted_s)).limit(limit)
        with self._engine.connect() as db:
            states = db.execute(newest).scalars().all()
        return [job for state in states if (job := _readable(state)) is not None]

    def events(self, job_id: JobId, after: int, limit: int, reach: Reach) -> list[StoredEvent]:
        """Events with a sequence above `after`, of a job within reach."""
        wanted = (EVENT.c.job_id == job_id) & (EVENT.c.sequence > after)
        events = select(EVENT).join(JOB, JOB.c.id == EVENT.c.job_id).where(wanted, _within(reach))
        with self._engine.connect() as db:
            rows = db.execute(events.order_by(EVENT.c.sequence).limit(limit)).all()
        return [StoredEvent(row.sequence, row.at_s, row.name, row.round, row.message) for row in rows]

    def versions(self, job_id: JobId, reach: Reach) -> list[StoredVersion]:
        """Versions that have not been pruned, oldest first, of a job within reach."""
        wanted = (VERSION.c.job_id == job_id) & (VERSION.c.pruned == 0)
        versions = select(VERSION).join(JOB, JOB.c.id == VERSION.c.job_id).where(wanted, _within(reach))
        with self._engine.connect() as db:
            rows = db.execute(versions.order_by(VERSION.c.round)).all()
        return [StoredVersion(_version(row), NodeName(row.aggregator)) for row in rows]

    def prune_versions(self, job_id: JobId, keep: frozenset[int], epoch: int) -> None:
        """Mark every version but these as gone."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            gone = (VERSION.c.job_id == job_id) & VERSION.c.round.not_in(keep) & (VERSION.c.pruned == 0)
            db.execute(update(VERSION).where(gone).values(pruned=1))

    def contributions(self, job_id: JobId, round_number: int) -> list[Contribution]:
        """The frozen list of a round, in seat order."""
        wanted = (CONTRIBUTION.c.job_id == job_id) & (CONTRIBUTION.c.round == round_number)
        with self._engine.connect() as db:
            rows = db.execute(select(CONTRIBUTION).where(wanted).order_by(CONTRIBUTION.c.seat)).all()
        return [
            Contribution(
                SeatIndex(row.seat), NodeName(row.worker), Sha256Hex(row.content_sha256), row.weight, row.size_bytes
            )
            for row in rows
        ]

    def keys(self, job_id: JobId) -> list[StoredKey]:
        """The job's data keys, oldest first."""
        with self._engine.connect() as db:
            return sql_keys.of_job(db, job_id)

    def erase_keys(self, job_id: JobId, numbers: frozenset[int], epoch: int) -> list[int]:
        """Erase the bytes of these data keys of the job; the numbers of those that were erased now."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            return sql_keys.erase(db, job_id, numbers)

    def keys_under_others(self, kek_id: str, after: tuple[JobId, int] | None, limit: int) -> list[OwnedKey]:
        """Data keys that do not rest under this key-encryption key, by job and epoch; of those after `after`."""
        with self._engine.connect() as db:
            return sql_keys.under_others(db, kek_id, after, limit)

    def rewrap_keys(self, moved: Sequence[tuple[OwnedKey, RestingKey]], epoch: int) -> int:
        """Let data keys rest under another key-encryption key; how many were still as they were read."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            return sum(sql_keys.rewrap(db, job_id, key, resting) for (job_id, key), resting in moved)

    def kek_ids(self) -> frozenset[str]:
        """The key-encryption keys that some key of a job or of a data set rests under."""
        with self._engine.connect() as db:
            return sql_keys.kek_ids(db) | sql_datasets.kek_ids(db)

    def add_dataset(self, dataset: StoredDataset, epoch: int) -> StoredDataset:
        """Store a new one; the earlier one when its digest is known already."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            return sql_datasets.add(db, dataset)

    def datasets(self) -> list[StoredDataset]:
        """All, oldest first."""
        with self._engine.connect() as db:
            return sql_datasets.every(db)

    def remove_dataset(self, digest: str, epoch: int) -> bool:
        """Erase one with its key; False if there is none."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            return sql_datasets.remove(db, digest)

    def rewrap_dataset(self, before: StoredDataset, resting: RestingKey, epoch: int) -> int:
        """Let the key of one rest under another key-encryption key; 0 if it is not as it was read any more."""
        with self._engine.begin() as db:
            _check_epoch(db, epoch)
            return sql_datasets.rewrap(db, before, resting)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()


def _within(reach: Reach) -> ColumnElement[bool]:
    """The condition that a job is within reach."""
    return true() if reach.org is None else JOB.c.org == reach.org


def _readable(state: str) -> Job | None:
    """A stored job; one that cannot be read is left alone, so that the others go on."""
    try:
        return _JOB.validate_json(state)
    except ValidationError as error:
        log.error("job_not_readable", state=state[:200], reason=str(error))
        return None


def _check_epoch(db: Connection, epoch: int) -> None:
    current = db.execute(_EPOCH).scalar()
    if current != epoch:
        raise ConflictError(f"epoch {epoch} is over: another coordinator writes with epoch {current}")


def _job_row(job: Job) -> dict[str, Any]:
    return {
        "name": job.spec.name,
        "owner": job.owner,
        "org": job.org,
        "stage": job.stage.value,
        "cleaned": int(job.cleaned),
        "state": _JOB.dump_json(replace(job, history=())).decode(),
        "submitted_s": job.submitted_s,
        "finished_s": job.finished_s,
    }


def _report_row(job_id: JobId, report: RoundReport) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "round": report.round,
        "attempt": report.attempt,
        "report": report.model_dump_json(),
    }


def _add(db: Connection, statement: Insert, rows: Sequence[dict[str, Any]]) -> None:
    """Insert all rows at once, if there are any."""
    if rows:
        db.execute(statement, rows)


def _with_history(db: Connection, job: Job) -> Job:
    """The job with its rounds. CorruptError: one of them cannot be read."""
    wanted = select(ROUND.c.report).where(ROUND.c.job_id == job.id).order_by(ROUND.c.round)
    reports = db.execute(wanted).scalars().all()
    try:
        return replace(job, history=tuple(RoundReport.model_validate_json(report) for report in reports))
    except ValidationError as error:
        raise CorruptError(f"job {job.id}: a stored round is not readable: {error}") from None


def _whole(db: Connection, state: str) -> Job | None:
    """A stored job with its rounds; one that cannot be read is left alone, so that the others go on."""
    job = _readable(state)
    try:
        return None if job is None else _with_history(db, job)
    except CorruptError as error:
        log.error("job_not_readable", state=state[:200], reason=error.message)
        return None


def _append(db: Connection, job_id: JobId, notes: Sequence[Note], epoch: int, now_s: float) -> None:
    last = db.execute(_LAST_EVENT, {"job": job_id}).scalar() or 0
    same = {"job_id": job_id, "at_s": now_s, "epoch": epoch}
    rows = [
        same | {"sequence": sequence, "name": note.name, "round": note.round, "message": _storable(note.message)}
        for sequence, note in enumerate(notes, start=last + 1)
    ]
    _add(db, _ADD_EVENT, rows)


def _storable(text: str) -> str:
    """What PostgreSQL takes: everything but U+0000, which the words of a worker may hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _write_contributions(db: Connection, before: Job, after: Job) -> None:
    """The list as it is frozen; a list given up with its attempt is replaced by that of the next."""
    if after.stage is not Stage.SEALED or before.stage is Stage.SEALED:
        return
    db.execute(_DROP_CONTRIBUTIONS, {"job": after.id, "of_round": after.round})
    same = {"job_id": after.id, "round": after.round, "attempt": after.attempt}
    rows = [
        same
        | {"seat": entry.seat, "worker": entry.worker, "content_sha256": entry.content_sha256}
        | {"weight": entry.weight, "size_bytes": entry.size_bytes}
        for entry in after.sealed
    ]
    _add(db, _ADD_CONTRIBUTION, rows)


def _write_version(db: Connection, before: Job, after: Job) -> None:
    version = after.version
    if version is None or version == before.version:
        return
    metrics = json.dumps(dict(version.metrics))
    if before.version is not None and before.version.round == version.round:
        same = (VERSION.c.job_id == after.id) & (VERSION.c.round == version.round)
        db.execute(update(VERSION).where(same).values(metrics=metrics))
        return
    row = {"job_id": after.id, "round": version.round, "sha256": version.sha256, "parameters": version.parameters}
    row |= {"manifest_sha256": version.manifest_sha256, "size_bytes": version.size_bytes, "metrics": metrics}
    row |= {"created_s": version.created_s, "aggregator": after.aggregator or "", "pruned": 0}
    _add(db, _ADD_VERSION, [row])


def _version(row: Row[Any]) -> Version:
    return Version(
        round=row.round,
        sha256=Sha256Hex(row.sha256),
        manifest_sha256=Sha256Hex(row.manifest_sha256),
        parameters=row.parameters,
        size_bytes=row.size_bytes,
        metrics=json.loads(row.metrics),
        created_s=row.created_s,
    )
