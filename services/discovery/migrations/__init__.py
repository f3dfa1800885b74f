"""Alembic migrations of discovery's table."""
