"""What the SDK tells about nodes, jobs' events and model versions."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from cortex_common.job.status import EventInfo as JobEvent
from cortex_common.job.status import VersionInfo as VersionView


class View(BaseModel):
    """Base of everything shown: immutable."""

    model_config = ConfigDict(frozen=True)


class GpuView(View):
    """One accelerator; `utilisation` is 0 to 1."""

    name: str
    memory_bytes: int
    memory_used_bytes: int
    utilisation: float


class ResourcesView(View):
    """What a node has and how busy it is; `cpu_utilisation` is the share of all cores in use, 0 to 1."""

    cpu_cores: int = 0
    cpu_utilisation: float = 0.0
    memory_bytes: int = 0
    memory_available_bytes: int = 0
    disk_free_bytes: int = 0
    network_sent_bytes: int = 0
    network_received_bytes: int = 0
    gpus: tuple[GpuView, ...] = ()
    slots: int = 0
    free_slots: int = 0


class DatasetView(View):
    """A dataset a node can read."""

    name: str
    input_shape: tuple[int, ...]
    classes: int
    examples: int


class SealedDatasetView(View):
    """A data set whose shards are sealed; `reference` is what a job names as data.train."""

    reference: str
    org: str
    added_by: str
    added_at: datetime | None = None
    signer: str
    input_shape: tuple[int, ...]
    classes: int
    examples: int
    shards: int


class NodeView(View):
    """A node as discovery knows it; `health` is live, suspect or expired."""

    name: str
    role: str
    region: str
    health: str
    address: str | None = None
    activity: str = ""
    version: str = ""
    resources: ResourcesView = ResourcesView()
    datasets: tuple[DatasetView, ...] = ()
    started_at: datetime | None = None
    last_seen_at: datetime | None = None
    lease_left_s: float = 0.0


class IdentityView(View):
    """Somebody with a certificate of the network, or shut out of it."""

    identity: str
    role: str
    name: str
    region: str
    serial: str = ""
    live_certificates: int = 0
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_reason: str = ""


class OpenTokenView(View):
    """A join token that has not been used."""

    token_id: str
    identity: str
    region: str
    expires_at: datetime | None = None


class IdentitiesView(View):
    """Who belongs to the network, and who may yet."""

    identities: tuple[IdentityView, ...] = ()
    tokens: tuple[OpenTokenView, ...] = ()


class KeyEpochView(View):
    """A data key of a job and what it is good for now: sealing, readable or erased."""

    job_id: str
    epoch: int
    key_id: str
    kek_id: str
    created_at: datetime | None
    reason: str
    from_round: int
    state: str


__all__ = [
    "DatasetView",
    "GpuView",
    "IdentitiesView",
    "IdentityView",
    "JobEvent",
    "KeyEpochView",
    "NodeView",
    "OpenTokenView",
    "ResourcesView",
    "VersionView",
]
