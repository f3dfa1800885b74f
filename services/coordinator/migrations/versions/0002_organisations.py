"""Jobs belong to an organisation; those there are, to the default one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    op.add_column("job", sa.Column("org", sa.String(length=63), nullable=False, server_default="default"))
    op.create_index(op.f("ix_job_org"), "job", ["org"], unique=False)
