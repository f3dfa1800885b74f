"""Settings of the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from cortex_common.job.parse import MAX_JOB_BYTES
from cortex_common.settings import ServiceSettings
from services.coordinator.domain.seen import Rules


class CoordinatorSettings(ServiceSettings):
    """What the coordinator needs to know, read once at start.

    Attributes:
        database: An SQLAlchemy URL, `postgresql://…` for one; SQLite in `state_dir` by default.
        database_password_file: Holds the database's password, which then is not in the URL.
        keyring: File of the key-encryption keys; made if there is none. `keyring.json` in `state_dir` by default; on
            another disk than the database it protects what a stolen or backed-up disk holds.
    """

    # A job file, and a little more.
    MAX_MESSAGE_BYTES: ClassVar[int] = MAX_JOB_BYTES + 64 * 1024

    port: int = Field(default=50051, ge=0, le=65535)
    discovery: str = "127.0.0.1:50052"
    database: str | None = None
    database_password_file: Path | None = None
    keyring: Path | None = None
    lease_s: float = Field(default=10.0, gt=0)
    gather_s: float = Field(default=5.0, ge=0)
    report_s: float = Field(default=2.0, ge=0)
    attempts: int = Field(default=3, ge=1)
    tries: int = Field(default=3, ge=1)

    @property
    def rules(self) -> Rules:
        """The limits that are the coordinator's, not the job's."""
        return Rules(self.lease_s, self.gather_s, self.report_s, self.attempts, self.tries)
