"""What people are told about a job: the status object of the HTTP API, the CLI and gRPC, one shape for all three."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator


class JobPhase(StrEnum):
    """The values of `status`."""

    SUBMITTED = "submitted"
    DEPLOYING = "deploying"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    TESTING = "testing"
    FINETUNING = "finetuning"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; such a phase never changes again."""
        return self in (JobPhase.COMPLETED, JobPhase.FAILED, JobPhase.CANCELLED)


class Report(BaseModel):
    """Base of everything shown: immutable."""

    model_config = ConfigDict(frozen=True)


class Dropped(Report):
    """A cohort member whose update is not in the round, and why."""

    worker: str
    reason: str


class RoundReport(Report):
    """One finished round. Bytes are payload as sent; `metrics` stand beside the other keys in JSON."""

    round: int
    attempt: int = 1
    seconds: float = 0.0
    train_seconds: float = 0.0
    exchange_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_between_regions: int = 0
    participants: int = 0
    accepted: int = 0
    dropped: tuple[Dropped, ...] = ()
    metrics: Mapping[str, float] = {}
    model_sha256: str = ""

    @model_validator(mode="before")
    @classmethod
    def _gather_metrics(cls, data: Any) -> Any:
        """Read the flat form back: a key that is no field is a metric."""
        if isinstance(data, dict) and "metrics" not in data:
            known = {key: value for key, value in data.items() if key in cls.model_fields}
            return known | {"metrics": {key: value for key, value in data.items() if key not in cls.model_fields}}
        return data

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        metrics: dict[str, float] = fields.pop("metrics")
        # Workers name metrics as they like; one named like a field could not be told from it.
        return {**fields, **{name: value for name, value in metrics.items() if name not in RoundReport.model_fields}}


class ModelSummary(Report):
    """The newest version; `sha256` is that of the safetensors file."""

    round: int
    sha256: str
    parameters: int


class PrivacySummary(Report):
    """What the job has spent of its privacy budget; None without differential privacy."""

    epsilon: float | None = None


class WorkerActivity(Report):
    """What one member of the cohort does now, and for how many seconds."""

    seat: int
    worker: str
    region: str
    activity: str
    since_s: float


class SiteRefusal(Report):
    """A rule of a site's own policy that keeps a worker from the job: its key there, what is given, what is allowed."""

    worker: str
    rule: str
    message: str


class JobStatus(Report):
    """Where a job stands. `goodput` is the share of time since the start that went into rounds that counted, 0 to 1."""

    job_id: str
    name: str
    status: JobPhase
    round: int
    rounds: int
    waiting_for: str | None = None
    metrics: Mapping[str, float] = {}
    history: tuple[RoundReport, ...] = ()
    model: ModelSummary | None = None
    goodput: float = 0.0
    privacy: PrivacySummary = PrivacySummary()
    error: str | None = None
    submitted_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    owner: str = ""
    workers: tuple[WorkerActivity, ...] = ()
    tensorboard_dir: str | None = None
    refusals: tuple[SiteRefusal, ...] = ()


class VersionInfo(Report):
    """One stored model version; `sha256` and `size_bytes` are those of the safetensors file."""

    job_id: str
    round: int
    sha256: str
    manifest_sha256: str
    parameters: int
    size_bytes: int
    metrics: Mapping[str, float] = {}
    created_at: datetime


class EventInfo(Report):
    """Something that happened to a job."""

    sequence: int
    at: datetime
    name: str
    round: int
    message: str
