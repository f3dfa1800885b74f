"""SQL engines as this project needs them, and migrations run from code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.pool import StaticPool

from cortex_common.errors import InvalidArgumentError, NotFoundError, UnavailableError

_ALLOWED = "allowed: sqlite:///FILE or postgresql://USER@HOST/DATABASE"
# What is erased is overwritten: wrapped keys must not linger in free pages.
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000", "secure_delete=ON")
_POSTGRES = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    # A commit is acknowledged once it is on the disk, and nobody waits for ever on anybody.
    "options": "-c synchronous_commit=on -c lock_timeout=10s -c statement_timeout=60s "
    "-c idle_in_transaction_session_timeout=60s",
}


def open_engine(url: str, password_file: Path | None = None) -> Engine:
    """An engine for `url`; SQLite gets one connection, a write-ahead log and a sync at every commit.

    One connection, because SQLite 3.7.0 to 3.51.2 can lose a write-ahead log that several connections checkpoint; a
    sync at every commit, because what was acknowledged must survive a power cut.

    Args:
        url: SQLAlchemy's; `postgresql://…` is spoken through psycopg.
        password_file: Holds the password, which then is not in the URL.

    Raises:
        InvalidArgumentError: not a URL, or of a database that is not supported.
        NotFoundError: the password file cannot be read.
    """
    target = _target(url, password_file)
    if target.get_backend_name() == "postgresql":
        # One thread writes, so that one connection will do; a second serves while the first is found dead.
        engine = create_engine(target, pool_size=1, max_overflow=1, pool_pre_ping=True, connect_args=_POSTGRES)
    else:
        engine = create_engine(target, poolclass=StaticPool, connect_args={"check_same_thread": False})
        event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "handle_error", _report_unreachable)
    return engine


def _target(url: str, password_file: Path | None) -> URL:
    try:
        target = make_url(url)
    except ArgumentError:
        raise InvalidArgumentError(f"database: not a URL; {_ALLOWED}") from None
    if target.get_backend_name() not in ("sqlite", "postgresql"):
        raise InvalidArgumentError(f"database: {target.get_backend_name()!r} given; {_ALLOWED}")
    if target.drivername == "postgresql":
        target = target.set(drivername="postgresql+psycopg")
    if password_file is None:
        return target
    try:
        return target.set(password=password_file.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise NotFoundError(f"password file {password_file} cannot be read: {error.strerror or error}") from error


def _report_unreachable(context: ExceptionContext) -> None:
    """Say in our words that the database is away, so that callers are told to try again."""
    if isinstance(context.sqlalchemy_exception, OperationalError | InterfaceError):
        reason = str(context.original_exception).strip().splitlines()
        raise UnavailableError(f"the database does not answer: {reason[0] if reason else 'connection lost'}")


def sqlite_url(path: Path) -> str:
    """The URL of a database file."""
    return f"sqlite:///{path}"


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
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
