"""Discovery's table. It may live in the same database as the coordinator's: names do not meet."""

from __future__ import annotations

from sqlalchemy import Column, Float, LargeBinary, MetaData, String, Table

METADATA = MetaData()
REVISION_TABLE = "discovery_revision"

NODE = Table(
    "discovery_node",
    METADATA,
    Column("name", String(63), primary_key=True),
    Column("role", String(20), nullable=False),
    Column("region", String(63), nullable=False),
    Column("address", String(300), nullable=False),
    Column("incarnation", String(64), nullable=False),
    Column("description", LargeBinary, nullable=False),
    Column("seen_wall_s", Float, nullable=False),
    Column("expired_wall_s", Float, nullable=True),
)
