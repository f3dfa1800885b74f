"""Run by Alembic; the connection comes from cortex_common.storage.sql.migrate."""

from __future__ import annotations

from alembic import context

from services.coordinator.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
