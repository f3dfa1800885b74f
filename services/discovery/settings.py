"""Settings of discovery."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from cortex_common.security.authority import ISSUING_LIFE, LEAF_LIFE, ROOT_LIFE, Lives
from cortex_common.settings import ServiceSettings
from services.discovery.domain import LeaseRules


class DiscoverySettings(ServiceSettings):
    """Where discovery listens, how long it bears silence, and what certificates it gives out.

    Attributes:
        authority: Folder of the network's certificate authority, made at the first start; unset where certificates come
            from elsewhere.
        enrolment_port: Where nodes enrol that have no certificate yet.
        join_tokens: JSON file of join tokens made beforehand (their hashes), taken up at the start.
        database: An SQLAlchemy URL to keep the snapshot in; a file in `state_dir` by default.
        database_password_file: Holds the database's password, which then is not in the URL.
        pass_life_s: How long a gateway may speak for a node after it proved its token; it is asked again at half of it.
    """

    MAX_MESSAGE_BYTES: ClassVar[int] = 256 * 1024

    port: int = Field(default=50052, ge=0, le=65535)
    lease_s: float = Field(default=10.0, gt=0)
    heartbeat_s: float = Field(default=3.0, gt=0)
    forget_s: float = Field(default=3600.0, gt=0)
    sweep_every_s: float = Field(default=0.5, gt=0)
    snapshot_every_s: float = Field(default=5.0, gt=0)
    database: str | None = None
    database_password_file: Path | None = None
    authority: Path | None = None
    enrolment_port: int = Field(default=50053, ge=0, le=65535)
    join_tokens: Path | None = None
    leaf_life_s: float = Field(default=LEAF_LIFE.total_seconds(), ge=1)
    issuing_life_s: float = Field(default=ISSUING_LIFE.total_seconds(), ge=1)
    root_life_s: float = Field(default=ROOT_LIFE.total_seconds(), ge=1)
    pass_life_s: float = Field(default=300.0, ge=1, le=3600)

    @property
    def lives(self) -> Lives:
        """How long certificates hold.

        Raises:
            InvalidArgumentError: a leaf could outlive its authority.
        """
        return Lives(
            *(timedelta(seconds=life_s) for life_s in (self.leaf_life_s, self.issuing_life_s, self.root_life_s))
        )

    @property
    def rules(self) -> LeaseRules:
        """How long silence is borne.

        Raises:
            InvalidArgumentError: the lease is too short for the heartbeats.
        """
        return LeaseRules(self.lease_s, self.heartbeat_s, self.forget_s)
