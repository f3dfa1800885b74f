"""The nodes of the last snapshot."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    op.create_table(
        "discovery_node",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("region", sa.String(length=63), nullable=False),
        sa.Column("address", sa.String(length=300), nullable=False),
        sa.Column("incarnation", sa.String(length=64), nullable=False),
        sa.Column("description", sa.LargeBinary(), nullable=False),
        sa.Column("seen_wall_s", sa.Float(), nullable=False),
        sa.Column("expired_wall_s", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    """Back to an empty database."""
    op.drop_table("discovery_node")
