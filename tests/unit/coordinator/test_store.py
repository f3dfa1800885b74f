"""The stores that need no server, and what is special to SQLite."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select
from sqlalchemy import update as update_rows

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.status import RoundReport
from cortex_common.storage.sql import open_engine, sqlite_url
from services.coordinator.domain.job import Tier
from services.coordinator.domain.reach import EVERYTHING
from services.coordinator.memory_store import MemoryStore
from services.coordinator.sql_store import SqlStore
from services.coordinator.tables import JOB, METADATA, ROUND
from tests.conformance.job_store import NOTE, JobStoreConformance
from tests.unit.coordinator.jobs import new_job


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SqlStore(open_engine(sqlite_url(tmp_path / "jobs.db")))
    yield made
    made.close()


class TestStores(JobStoreConformance):
    """In memory and in SQLite."""


def test_the_migrations_give_the_tables_the_code_uses(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "jobs.db"))
    SqlStore(engine)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_opening_a_database_again_keeps_it(tmp_path):
    first = SqlStore(open_engine(sqlite_url(tmp_path / "jobs.db")))
    epoch = first.acquire("me", 1.0)
    first.insert(new_job(), None, NOTE, epoch, 1.0)
    first.close()
    second = SqlStore(open_engine(sqlite_url(tmp_path / "jobs.db")))
    assert second.acquire("me", 2.0) == 2
    assert second.get(JobId("j1"), EVERYTHING) == new_job()


def test_tiers_stored_before_they_could_lie_above_each_other_forward_to_the_root(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "jobs.db"))
    store = SqlStore(engine)
    epoch = store.acquire("me", 1.0)
    leaf = Tier("eu.paris", NodeName("agg-paris"), "a:1", (SeatIndex(0),), above=1)
    nested = replace(new_job(), tiers=(leaf, Tier("eu", NodeName("agg-eu"), "a:2", ())))
    store.insert(nested, None, NOTE, epoch, 1.0)
    assert store.get(JobId("j1"), EVERYTHING) == nested
    with engine.begin() as db:
        state = json.loads(db.execute(select(JOB.c.state)).scalar_one())
        assert [tier.pop("above") for tier in state["tiers"]] == [1, None]
        db.execute(update_rows(JOB).values(state=json.dumps(state)))
    found = store.get(JobId("j1"), EVERYTHING)
    assert found is not None
    assert [tier.above for tier in found.tiers] == [None, None]


def test_a_job_that_cannot_be_read_keeps_nobody_from_starting(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "jobs.db"))
    store = SqlStore(engine)
    epoch = store.acquire("me", 1.0)
    store.insert(new_job(), None, NOTE, epoch, 1.0)
    store.insert(replace(new_job(), id=JobId("j2")), None, NOTE, epoch, 1.0)
    with engine.begin() as db:
        db.execute(update_rows(JOB).where(JOB.c.id == "j1").values(state="{"))
    assert [job.id for job in store.unfinished()] == ["j2"]
    assert [job.id for job in store.newest(10, EVERYTHING)] == ["j2"]
    with pytest.raises(CorruptError, match="j1"):
        store.get(JobId("j1"), EVERYTHING)


def test_a_round_that_cannot_be_read_keeps_nobody_from_starting(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "jobs.db"))
    store = SqlStore(engine)
    epoch = store.acquire("me", 1.0)
    for job in (new_job(), replace(new_job(), id=JobId("j2"))):
        store.insert(job, None, NOTE, epoch, 1.0)
        store.commit(job, replace(job, history=(RoundReport(round=1),)), [], epoch, 2.0)
    with engine.begin() as db:
        db.execute(update_rows(ROUND).where(ROUND.c.job_id == "j1").values(report='{"round": "first"}'))
    assert [job.id for job in store.unfinished()] == ["j2"]
    with pytest.raises(CorruptError, match="j1"):
        store.get(JobId("j1"), EVERYTHING)


@pytest.mark.parametrize("name", ["round", "accepted", "dropped", "metrics", "model_sha256"])
def test_a_metric_takes_the_place_of_no_field_of_its_report(store, name):
    epoch = store.acquire("me", 1.0)
    job = new_job()
    store.insert(job, None, NOTE, epoch, 1.0)
    report = RoundReport(round=1, accepted=2, metrics={name: 0.25, "train_loss": 0.5})
    store.commit(job, replace(job, history=(report,)), [], epoch, 2.0)
    kept = store.get(job.id, EVERYTHING).history[0].model_dump()
    assert (kept["round"], kept["accepted"], kept["dropped"], kept["train_loss"]) == (1, 2, (), 0.5)
