"""The coordinator's tables. `job.state` is the durable Job without its history; what people query has its own rows."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

METADATA = MetaData()
MAX_REASON = 200
"""Characters of why a data key was made; PostgreSQL takes no longer one."""

LEASE = Table(
    "lease",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("holder", String(100), nullable=False),
    Column("acquired_s", Float, nullable=False),
)

JOB = Table(
    "job",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("request_id", String(301), nullable=True, unique=True),
    Column("name", String(100), nullable=False),
    Column("owner", String(100), nullable=False),
    Column("org", String(63), nullable=False, index=True),
    Column("stage", String(20), nullable=False, index=True),
    Column("revision", BigInteger, nullable=False),
    Column("cleaned", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("submitted_s", Float, nullable=False, index=True),
    Column("finished_s", Float, nullable=True),
)

ROUND = Table(
    "round",
    METADATA,
    Column("job_id", String(64), ForeignKey("job.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("report", Text, nullable=False),
)

CONTRIBUTION = Table(
    "contribution",
    METADATA,
    Column("job_id", String(64), ForeignKey("job.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("seat", Integer, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("worker", String(63), nullable=False),
    Column("content_sha256", String(64), nullable=False),
    Column("weight", Float, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    UniqueConstraint("job_id", "round", "worker", name="one_contribution_per_worker"),
)

VERSION = Table(
    "version",
    METADATA,
    Column("job_id", String(64), ForeignKey("job.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("metrics", Text, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("aggregator", String(63), nullable=False),
    Column("pruned", Integer, nullable=False),
)

DATA_KEY = Table(
    "data_key",
    METADATA,
    Column("job_id", String(64), ForeignKey("job.id"), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("key_id", String(64), nullable=False, unique=True),
    Column("kek_id", String(100), nullable=False, index=True),
    # Under the key-encryption key named; empty once the epoch has been erased.
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("reason", String(MAX_REASON), nullable=False),
    Column("from_round", Integer, nullable=False),
    Column("from_attempt", Integer, nullable=False),
)

DATASET = Table(
    "dataset",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("org", String(63), nullable=False),
    # The signed manifest.
    Column("manifest", Text, nullable=False),
    Column("kek_id", String(100), nullable=False, index=True),
    # Its key, under the key-encryption key named.
    Column("wrapped", LargeBinary, nullable=False),
    Column("added_s", Float, nullable=False),
    Column("added_by", String(100), nullable=False),
)

EVENT = Table(
    "event",
    METADATA,
    Column("job_id", String(64), ForeignKey("job.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("at_s", Float, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("name", String(40), nullable=False),
    Column("round", Integer, nullable=False),
    Column("message", Text, nullable=False),
)
