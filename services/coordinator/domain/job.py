"""What must survive a crash: the durable state of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cortex_common.ids import DEFAULT_ORG, JobId, NodeName, SeatIndex, Sha256Hex
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import JobPhase, RoundReport


class Stage(StrEnum):
    """Where a job is inside its round. Round 0 makes the first version; training begins with round 1."""

    GATHERING = "gathering"
    COLLECTING = "collecting"
    SEALED = "sealed"
    TESTING = "testing"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; such a stage never changes again."""
        return self in (Stage.COMPLETED, Stage.FAILED, Stage.CANCELLED)


@dataclass(frozen=True, slots=True)
class Trained:
    """A worker's own account of its round. `exchange_s` is pull and push together."""

    worker: NodeName
    train_s: float
    exchange_s: float
    examples: int
    steps: int
    metrics: Mapping[str, float]
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Contribution:
    """An update that an aggregator holds durably, as it stands in the frozen list of its round."""

    seat: SeatIndex
    worker: NodeName
    content_sha256: Sha256Hex
    weight: float
    size_bytes: int
    trained: Trained | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A model version; `sha256` is that of its safetensors file."""

    round: int
    sha256: Sha256Hex
    manifest_sha256: Sha256Hex
    parameters: int
    size_bytes: int
    metrics: Mapping[str, float]
    created_s: float


@dataclass(frozen=True, slots=True)
class Tier:
    """A round below the root's, at a region's aggregator, which forwards its mean.

    It goes to the tier with index `above`, or to the root (None). Either `seats` upload here (a leaf), or the tiers
    below do (a junction: it has no seats of its own).
    """

    region: str
    aggregator: NodeName
    address: str
    seats: tuple[SeatIndex, ...]
    above: int | None = None


@dataclass(frozen=True, slots=True)
class UsedTier:
    """Where a tier's round ran once: something of it may lie there."""

    transfer_id: JobId
    aggregator: NodeName
    address: str


@dataclass(frozen=True, slots=True)
class Dropout:
    """A seat that left its round, and why."""

    seat: SeatIndex
    worker: NodeName
    reason: str


@dataclass(frozen=True, slots=True)
class Job:
    """One job. `seats[i]` trains partition i; it is None while nobody holds the seat.

    `signed_job` is the envelope it was submitted in, if it was signed; `spec` is what that says.
    `aggregator` holds the versions; with `tiers` it is the root, without them workers upload to it directly. `moves` of
    the attempts were made because a region had to move, `used` is every tier there ever was. `included` is the last
    round whose version holds an update of a worker, `base_seats` the seats in the newest. `key_holders` is everybody
    who was given the present epoch's data key, `rekey` why the next round begins a new one; while
    `resealing`, what is stored comes under the newest, and no version is under one older than `sealed_since`. Times are
    wall-clock seconds, for display.
    """

    id: JobId
    spec: JobSpec
    owner: str
    submitted_s: float
    org: str = DEFAULT_ORG
    signed_job: str = ""
    stage: Stage = Stage.GATHERING
    pausing: bool = False
    round: int = 0
    attempt: int = 1
    moves: int = 0
    seats: tuple[NodeName | None, ...] = ()
    cohort: tuple[SeatIndex, ...] = ()
    dropped: tuple[Dropout, ...] = ()
    aggregator: NodeName | None = None
    aggregator_address: str = ""
    tiers: tuple[Tier, ...] = ()
    used: tuple[UsedTier, ...] = ()
    sealed: tuple[Contribution, ...] = ()
    version: Version | None = None
    included: Mapping[NodeName, int] = field(default_factory=dict)
    base_seats: tuple[SeatIndex, ...] = ()
    history: tuple[RoundReport, ...] = ()
    pending: RoundReport | None = None
    opened_s: float | None = None
    started_s: float | None = None
    finished_s: float | None = None
    error: str | None = None
    cleaned: bool = False
    rekey: str = ""
    key_holders: tuple[str, ...] = ()
    resealing: bool = False
    sealed_since: int = 0

    @property
    def members(self) -> Mapping[SeatIndex, NodeName]:
        """Who holds the seats of the round's cohort."""
        return {seat: worker for seat in self.cohort if (worker := self.seats[seat]) is not None}

    def tier_of(self, seat: SeatIndex) -> int | None:
        """Index of the tier a seat belongs to; None when it uploads to the root."""
        return next((index for index, tier in enumerate(self.tiers) if seat in tier.seats), None)

    def below(self, tier: int | None) -> tuple[int, ...]:
        """Indices of the tiers that forward to a tier, or to the root (None)."""
        return tuple(index for index, each in enumerate(self.tiers) if each.above == tier)

    def transfer_id(self, tier: int | None) -> JobId:
        """Id under which an aggregator knows the round of a tier; the root's is the job's own."""
        return self.id if tier is None else JobId(f"{self.id}-t{tier}")

    @property
    def phase(self) -> JobPhase:
        """The stage in the words of the status object."""
        if self.stage in _PHASES:
            return _PHASES[self.stage]
        if self.round == 0:
            return JobPhase.DEPLOYING if self.cohort else JobPhase.SUBMITTED
        return JobPhase.AGGREGATING if self.stage is Stage.SEALED else JobPhase.TRAINING

    def goodput(self, wall_s: float) -> float:
        """Share of the time from the start to `wall_s`, or to its end, that went into rounds that counted, 0 to 1."""
        if self.started_s is None:
            return 0.0
        elapsed_s = (self.finished_s if self.finished_s is not None else wall_s) - self.started_s
        counted_s = sum(report.seconds for report in self.history)
        return min(1.0, counted_s / elapsed_s) if elapsed_s > 0 else 0.0


_PHASES = {
    Stage.TESTING: JobPhase.TESTING,
    Stage.PAUSED: JobPhase.PAUSED,
    Stage.COMPLETED: JobPhase.COMPLETED,
    Stage.FAILED: JobPhase.FAILED,
    Stage.CANCELLED: JobPhase.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Note:
    """One line of a job's event log."""

    name: str
    round: int
    message: str
