"""Data keys, wrapped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table; jobs from before it have their keys nowhere that is still read."""
    op.create_table(
        "data_key",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("kek_id", sa.String(length=100), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("created_s", sa.Float(), nullable=False),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("from_round", sa.Integer(), nullable=False),
        sa.Column("from_attempt", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"]),
        sa.PrimaryKeyConstraint("job_id", "epoch"),
        sa.UniqueConstraint("key_id"),
    )
    op.create_index(op.f("ix_data_key_kek_id"), "data_key", ["kek_id"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_data_key_kek_id"), table_name="data_key")
    op.drop_table("data_key")
