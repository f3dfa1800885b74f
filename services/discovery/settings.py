"""Settings of discovery."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cortex_common.settings import ServiceSettings
from services.discovery.domain import LeaseRules


class DiscoverySettings(ServiceSettings):
    """Where discovery listens, and how long it bears silence.

    Attributes:
        database: An SQLAlchemy URL to keep the snapshot in; a file in `state_dir` by default.
        database_password_file: Holds the database's password, which then is not in the URL.
    """

    port: int = Field(default=50052, ge=0, le=65535)
    lease_s: float = Field(default=10.0, gt=0)
    heartbeat_s: float = Field(default=3.0, gt=0)
    forget_s: float = Field(default=3600.0, gt=0)
    sweep_every_s: float = Field(default=0.5, gt=0)
    snapshot_every_s: float = Field(default=5.0, gt=0)
    database: str | None = None
    database_password_file: Path | None = None

    @property
    def rules(self) -> LeaseRules:
        """How long silence is borne.

        Raises:
            InvalidArgumentError: the lease is too short for the heartbeats.
        """
        return LeaseRules(self.lease_s, self.heartbeat_s, self.forget_s)
