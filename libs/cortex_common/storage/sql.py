"""SQL engines as this project needs them, and migrations run from code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import StaticPool


def open_engine(url: str) -> Engine:
    """An engine for `url`; SQLite gets one connection, a write-ahead log and a sync at every commit.

    One connection, because SQLite 3.7.0 to 3.51.2 can lose a write-ahead log that several connections checkpoint; a
    sync at every commit, because what was acknowledged must survive a power cut.
    """
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    event.listen(engine, "connect", _set_pragmas)
    return engine


def sqlite_url(path: Path) -> str:
    """The URL of a database file."""
    return f"sqlite:///{path}"


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def migrate(engine: Engine, script_location: str) -> None:
    """Bring the schema to the newest revision.

    Args:
        engine: The database.
        script_location: Alembic's folder as `package:folder`.
    """
    config = Config()
    config.set_main_option("script_location", script_location)
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
