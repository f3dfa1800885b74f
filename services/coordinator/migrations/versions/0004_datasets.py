"""Sealed data sets, with their keys, wrapped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "dataset",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("kek_id", sa.String(length=100), nullable=False),
        sa.Column("wrapped", sa.LargeBinary(), nullable=False),
        sa.Column("added_s", sa.Float(), nullable=False),
        sa.Column("added_by", sa.String(length=100), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index(op.f("ix_dataset_kek_id"), "dataset", ["kek_id"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_dataset_kek_id"), table_name="dataset")
    op.drop_table("dataset")
