"""Run by Alembic; the connection comes from cortex_common.storage.sql.migrate."""

from __future__ import annotations

from alembic import context

from services.discovery.tables import METADATA, REVISION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=REVISION_TABLE,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
