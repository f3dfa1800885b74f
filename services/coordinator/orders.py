"""What crosses the service's borders as plain data: work orders for workers, round orders for aggregators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.spec import JobSpec
from cortex_common.security.encryption import DataKey
from services.coordinator.domain.assignments import Assignment
from services.coordinator.domain.job import Contribution, Version


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment with all that the worker needs for it."""

    assignment: Assignment
    spec: JobSpec
    data_key: DataKey
    aggregator: NodeName
    address: str
    base: Version | None
    fence: int
    chunk_elements: int


@dataclass(frozen=True, slots=True)
class RoundOrder:
    """A round as an aggregator is told to open it. `base_sha256` is empty in round 0."""

    job_id: JobId
    round: int
    attempt: int
    fence: int
    base_sha256: str
    seats: Mapping[SeatIndex, NodeName]
    spec: JobSpec
    data_key: DataKey
    chunk_elements: int


@dataclass(frozen=True, slots=True)
class SealOrder:
    """A frozen list, to be folded."""

    job_id: JobId
    round: int
    attempt: int
    fence: int
    contributions: tuple[Contribution, ...]
    data_key: DataKey
