"""What crosses the service's borders as plain data: work orders for workers, round orders for aggregators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.spec import JobSpec
from cortex_common.security.encryption import DataKey
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.coordinator.domain.assignments import Assignment
from services.coordinator.domain.job import Contribution, Job, Version


@dataclass(frozen=True, slots=True)
class Server:
    """An aggregator, and its host:port."""

    name: NodeName
    address: str


@dataclass(frozen=True, slots=True)
class DataKeys:
    """The data keys that go with an order: the one to seal with, and older ones to read with."""

    current: DataKey
    older: tuple[DataKey, ...] = ()


@dataclass(frozen=True, slots=True)
class SealedPart:
    """The shards of a sealed data set that a seat trains on: the signed manifest, their indices, the key of each."""

    manifest: str
    shards: tuple[int, ...]
    keys: tuple[DataKey, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment with all its worker needs; updates travel under `transfer_id`, versions under the job's id."""

    assignment: Assignment
    transfer_id: JobId
    spec: JobSpec
    keys: DataKeys
    aggregator: NodeName
    address: str
    base: Version | None
    fence: int
    chunk_elements: int
    included_round: int | None = None
    base_seats: tuple[SeatIndex, ...] = ()
    signed_job: str = ""
    sealed: SealedPart | None = None

    @classmethod
    def of(
        cls, job: Job, assignment: Assignment, keys: DataKeys, sealed: SealedPart | None, address: str, fence: int
    ) -> Self:
        """The order for an assignment of a job whose aggregator is known, at the address of its tier's."""
        tier = job.tier_of(assignment.seat)
        return cls(
            assignment=assignment,
            transfer_id=job.transfer_id(tier),
            spec=job.spec,
            keys=keys,
            aggregator=(job.aggregator or NodeName("")) if tier is None else job.tiers[tier].aggregator,
            address=address,
            base=job.version,
            fence=fence,
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            included_round=job.included.get(job.seats[assignment.seat] or NodeName("")),
            base_seats=job.base_seats,
            signed_job=job.signed_job,
            sealed=sealed,
        )


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """A round as an aggregator is told to open it.

    `job_id` is the tier's in a region, `base_sha256` is empty in round 0, `seats` are the tiers below if there are any,
    `is_plain` means updates come as float32 whatever the job's codec is, `upstream` tells the round that takes this
    one's result, where it is by then, `readers` hold a seat of the job that takes no part in this round.
    """

    job_id: JobId
    round: int
    attempt: int
    fence: int
    base_sha256: str
    seats: Mapping[SeatIndex, NodeName]
    spec: JobSpec
    keys: DataKeys
    chunk_elements: int
    is_plain: bool = False
    upstream: Callable[[], Upstream] | None = None
    readers: tuple[NodeName, ...] = ()


@dataclass(frozen=True, slots=True)
class Upstream:
    """The round one tier up, and this tier's seat in it; versions are there under `model_job_id`."""

    aggregator: NodeName
    address: str
    job_id: JobId
    seat: SeatIndex
    model_job_id: JobId


@dataclass(frozen=True, slots=True)
class SealOrder:
    """A frozen list, to be folded."""

    job_id: JobId
    round: int
    attempt: int
    fence: int
    contributions: tuple[Contribution, ...]
    keys: DataKeys


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an aggregator holds under an id, and the rounds of it that stay."""

    job_id: JobId
    keep: tuple[int, ...]
    server: Callable[[], Server]
