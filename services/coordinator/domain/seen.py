"""What the coordinator has seen since it started: rebuilt from aggregators, workers and discovery after a crash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cortex_common.ids import NodeName, SeatIndex
from cortex_common.job.site_policy import Refusal
from services.coordinator.domain.job import Contribution, Trained


@dataclass(frozen=True, slots=True)
class Dataset:
    """What placement must know of a dataset; `shards` of one that is sealed."""

    elements: int
    classes: int
    shards: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as seen now.

    `lost_since_s` is when its line broke (monotonic), None while it attends; `is_expired` is discovery's word;
    `is_revoked` the network's: it was shut out; without `is_known` discovery has not told of it yet, so what it has is
    unknown.
    """

    name: NodeName
    region: str
    slots: int
    lost_since_s: float | None = None
    is_expired: bool = False
    is_suspect: bool = False
    is_revoked: bool = False
    is_known: bool = True
    gpus: int = 0
    memory_bytes: int = 0
    cpu_utilisation: float = 0.0
    datasets: Mapping[str, Dataset] = field(default_factory=dict)

    def is_live(self, now_s: float, lease_s: float) -> bool:
        """Whether it may hold a seat: it attends, or its line broke less than a lease ago."""
        if self.is_expired or self.is_revoked:
            return False
        return self.lost_since_s is None or now_s - self.lost_since_s < lease_s


@dataclass(frozen=True, slots=True)
class AggregatorView:
    """An aggregator as discovery sees it."""

    name: NodeName
    region: str
    address: str
    is_live: bool


@dataclass(frozen=True, slots=True)
class World:
    """Everybody, and who has no free place. `taken` leaves out what the job asked about holds itself.

    `refused` are the workers whose sites' policies forbid them the job asked about, with the rules that do; `revoked`
    the aggregators that were shut out, seen or not.
    """

    workers: Mapping[NodeName, WorkerView]
    aggregators: Mapping[NodeName, AggregatorView]
    taken: frozenset[NodeName] = frozenset()
    refused: Mapping[NodeName, tuple[Refusal, ...]] = field(default_factory=dict)
    revoked: frozenset[NodeName] = frozenset()

    def is_gone(self, aggregator: NodeName) -> bool:
        """Whether an aggregator was shut out or does not live. One that was never seen may be on its way."""
        view = self.aggregators.get(aggregator)
        return aggregator in self.revoked or (view is not None and not view.is_live)

    def is_willing(self, name: NodeName) -> bool:
        """Whether the worker's site does not refuse the job."""
        return name not in self.refused


@dataclass(frozen=True, slots=True)
class SliceScore:
    """Sums over one slice of the test set."""

    examples: int
    loss_sum: float
    correct: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A seat's work that could not be done."""

    worker: NodeName
    reason: str
    is_permanent: bool


@dataclass(frozen=True, slots=True)
class Activity:
    """What a seat's worker does, since when (monotonic)."""

    worker: NodeName
    words: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Observations about one stage of one attempt; the next starts with an empty one.

    `open_seats` is who may upload, as the aggregator was told. `trouble` is why an aggregator cannot be talked to now,
    or why the next round cannot be opened, `spoilt` why the attempt must be made again, `fatal` why the job cannot go
    on.
    """

    since_s: float
    open_seats: Mapping[SeatIndex, NodeName] = field(default_factory=dict)
    accepted: Mapping[SeatIndex, Contribution] = field(default_factory=dict)
    accepted_at: Mapping[SeatIndex, float] = field(default_factory=dict)
    trained: Mapping[SeatIndex, Trained] = field(default_factory=dict)
    scores: Mapping[int, SliceScore] = field(default_factory=dict)
    failures: Mapping[SeatIndex, tuple[Failure, ...]] = field(default_factory=dict)
    activities: Mapping[SeatIndex, Activity] = field(default_factory=dict)
    aggregated: AggregatedVersion | None = None
    spoilt: str | None = None
    trouble: str | None = None
    fatal: str | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """Bytes of a tier's update to the tier above, and of the versions that its aggregator fetched for the round."""

    up_bytes: int
    down_bytes: int


@dataclass(frozen=True, slots=True)
class AggregatedVersion:
    """The aggregator's answer to a sealed round; `hops` is what went to and from each tier for it."""

    sha256: str
    manifest_sha256: str
    parameters: int
    size_bytes: int
    update_norm: float
    hops: Mapping[int, Hop] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits that are the coordinator's, not the job's.

    A data key is replaced after `data_key_age_s` or `data_key_rounds`, whichever comes first.
    """

    lease_s: float = 10.0
    gather_s: float = 5.0
    report_s: float = 2.0
    attempts: int = 3
    tries: int = 3
    data_key_age_s: float = 86400.0
    data_key_rounds: int = 1000
