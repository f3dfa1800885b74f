"""Where jobs are kept: the port, and what is written with each step of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cortex_common.ids import JobId, KeyId, NodeName
from cortex_common.security.keyring import RestingKey
from services.coordinator.domain.job import Contribution, Job, Note, Version
from services.coordinator.domain.reach import Reach


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A line of a job's event log; `sequence` counts from 1 in each job."""

    sequence: int
    at_s: float
    name: str
    round: int
    message: str


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version and the aggregator that holds it."""

    version: Version
    aggregator: NodeName


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A job's data key of one epoch, wrapped under a key-encryption key; no bytes once it has been erased.

    It is the job's key from `from_round` and `from_attempt` on.
    """

    key_id: KeyId
    epoch: int
    resting: RestingKey
    created_s: float
    reason: str
    from_round: int = 0
    from_attempt: int = 0

    @property
    def is_erased(self) -> bool:
        """Whether nothing can be opened with it any more."""
        return not self.resting.wrapped


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A sealed data set: its signed manifest, whose jobs may use it, and its key, wrapped as data keys are."""

    digest: str
    org: str
    manifest: str
    key: RestingKey
    added_s: float
    added_by: str


OwnedKey = tuple[JobId, StoredKey]
"""A data key, and whose it is."""


class Store(Protocol):
    """Everything durable of the coordinator. Calls block; one that writes is one transaction, synced on return.

    Every write carries the epoch taken by `acquire`; once somebody else has taken a newer one, writes raise
    ConflictError.
    """

    def acquire(self, holder: str, now_s: float) -> int:
        """Become the writer; gives the new epoch."""

    def insert(
        self,
        job: Job,
        request_id: str | None,
        note: Note,
        epoch: int,
        now_s: float,
        keys: Sequence[StoredKey] = (),
    ) -> JobId:
        """Store a new job and its keys; the id of the earlier one when `request_id` was used before."""

    def find_request(self, request_id: str) -> JobId | None:
        """The job that was submitted under this id."""

    def commit(
        self, before: Job, after: Job, notes: Sequence[Note], epoch: int, now_s: float, keys: Sequence[StoredKey] = ()
    ) -> None:
        """Replace `before` by `after`, with everything that follows from the difference, or raise ConflictError.

        New `keys` are stored in the same transaction.
        """

    def get(self, job_id: JobId, reach: Reach) -> Job | None:
        """The job with its history, if it is within reach."""

    def unfinished(self) -> list[Job]:
        """Jobs that have not ended or not been cleaned up, oldest first."""

    def newest(self, limit: int, reach: Reach) -> list[Job]:
        """Jobs within reach without their history, newest first."""

    def events(self, job_id: JobId, after: int, limit: int, reach: Reach) -> list[StoredEvent]:
        """Events with a sequence above `after`, of a job within reach."""

    def versions(self, job_id: JobId, reach: Reach) -> list[StoredVersion]:
        """Versions that have not been pruned, oldest first, of a job within reach."""

    def prune_versions(self, job_id: JobId, keep: frozenset[int], epoch: int) -> None:
        """Mark every version but these as gone."""

    def contributions(self, job_id: JobId, round_number: int) -> list[Contribution]:
        """The frozen list of a round, in seat order."""

    def keys(self, job_id: JobId) -> list[StoredKey]:
        """The job's data keys, oldest first."""

    def erase_keys(self, job_id: JobId, numbers: frozenset[int], epoch: int) -> list[int]:
        """Erase the bytes of these data keys of the job; the numbers of those that were erased now."""

    def keys_under_others(self, kek_id: str, after: tuple[JobId, int] | None, limit: int) -> list[OwnedKey]:
        """Data keys that do not rest under this key-encryption key, by job and epoch; of those after `after`."""

    def rewrap_keys(self, moved: Sequence[tuple[OwnedKey, RestingKey]], epoch: int) -> int:
        """Let data keys rest under another key-encryption key; how many were still as they were read."""

    def kek_ids(self) -> frozenset[str]:
        """The key-encryption keys that some key of a job or of a data set rests under."""

    def add_dataset(self, dataset: StoredDataset, epoch: int) -> StoredDataset:
        """Store a new one; the earlier one when its digest is known already."""

    def datasets(self) -> list[StoredDataset]:
        """All, oldest first."""

    def remove_dataset(self, digest: str, epoch: int) -> bool:
        """Erase one with its key; False if there is none."""

    def rewrap_dataset(self, before: StoredDataset, resting: RestingKey, epoch: int) -> int:
        """Let the key of one rest under another key-encryption key; 0 if it is not as it was read any more."""

    def close(self) -> None:
        """Let go of the database."""
