"""The store in memory: for tests and for trying things out; nothing survives the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cortex_common.errors import ConflictError
from cortex_common.ids import JobId, NodeName
from cortex_common.security.keyring import RestingKey
from services.coordinator.domain.job import Contribution, Job, Note, Stage
from services.coordinator.domain.reach import Reach
from services.coordinator.store import OwnedKey, StoredDataset, StoredEvent, StoredKey, StoredVersion


class MemoryStore:
    """Implements Store."""

    def __init__(self) -> None:
        self._epoch = 0
        self._jobs: dict[JobId, Job] = {}
        self._requests: dict[str, JobId] = {}
        self._events: dict[JobId, list[StoredEvent]] = {}
        self._versions: dict[JobId, dict[int, StoredVersion]] = {}
        self._keys: dict[JobId, dict[int, StoredKey]] = {}
        self._datasets: dict[str, StoredDataset] = {}
        self._contributions: dict[tuple[JobId, int], list[Contribution]] = {}

    def acquire(self, holder: str, now_s: float) -> int:
        """Become the writer; gives the new epoch."""
        self._epoch += 1
        return self._epoch

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
        self._check(epoch)
        if request_id is not None and request_id in self._requests:
            return self._requests[request_id]
        if request_id is not None:
            self._requests[request_id] = job.id
        self._jobs[job.id] = job
        self._keys[job.id] = {key.epoch: key for key in keys}
        self._append(job.id, [note], now_s)
        return job.id

    def find_request(self, request_id: str) -> JobId | None:
        """The job that was submitted under this id."""
        return self._requests.get(request_id)

    def commit(
        self, before: Job, after: Job, notes: Sequence[Note], epoch: int, now_s: float, keys: Sequence[StoredKey] = ()
    ) -> None:
        """Replace `before` by `after`, with everything that follows from the difference, or raise ConflictError."""
        self._check(epoch)
        stored = self._jobs.get(after.id)
        if stored is None or (stored.stage.is_terminal and stored.stage is not after.stage):
            raise ConflictError(f"job {after.id} has ended already")
        self._jobs[after.id] = after
        self._keys[after.id] = self._keys.get(after.id, {}) | {key.epoch: key for key in keys}
        if after.stage is Stage.SEALED and before.stage is not Stage.SEALED:
            self._contributions[after.id, after.round] = list(after.sealed)
        if after.version is not None and after.version != before.version:
            versions = self._versions.setdefault(after.id, {})
            versions[after.version.round] = StoredVersion(after.version, after.aggregator or NodeName(""))
        self._append(after.id, notes, now_s)

    def get(self, job_id: JobId, reach: Reach) -> Job | None:
        """The job with its history, if it is within reach."""
        job = self._jobs.get(job_id)
        return job if job is not None and reach.covers(job) else None

    def unfinished(self) -> list[Job]:
        """Jobs that have not ended or not been cleaned up, oldest first."""
        wanted = [job for job in self._jobs.values() if not (job.stage.is_terminal and job.cleaned)]
        return sorted(wanted, key=lambda job: job.submitted_s)

    def newest(self, limit: int, reach: Reach) -> list[Job]:
        """Jobs within reach without their history, newest first."""
        ordered = sorted(filter(reach.covers, self._jobs.values()), key=lambda job: -job.submitted_s)
        return [replace(job, history=()) for job in ordered[:limit]]

    def events(self, job_id: JobId, after: int, limit: int, reach: Reach) -> list[StoredEvent]:
        """Events with a sequence above `after`, of a job within reach."""
        events = self._events.get(job_id, []) if self.get(job_id, reach) else []
        return [event for event in events if event.sequence > after][:limit]

    def versions(self, job_id: JobId, reach: Reach) -> list[StoredVersion]:
        """Versions that have not been pruned, oldest first, of a job within reach."""
        versions = self._versions.get(job_id, {}) if self.get(job_id, reach) else {}
        return [versions[number] for number in sorted(versions)]

    def prune_versions(self, job_id: JobId, keep: frozenset[int], epoch: int) -> None:
        """Mark every version but these as gone."""
        self._check(epoch)
        versions = self._versions.get(job_id, {})
        self._versions[job_id] = {number: version for number, version in versions.items() if number in keep}

    def contributions(self, job_id: JobId, round_number: int) -> list[Contribution]:
        """The frozen list of a round, in seat order."""
        return [replace(entry, trained=None) for entry in self._contributions.get((job_id, round_number), [])]

    def keys(self, job_id: JobId) -> list[StoredKey]:
        """The job's data keys, oldest first."""
        keys = self._keys.get(job_id, {})
        return [keys[epoch] for epoch in sorted(keys)]

    def erase_keys(self, job_id: JobId, numbers: frozenset[int], epoch: int) -> list[int]:
        """Erase the bytes of these data keys of the job; the numbers of those that were erased now."""
        self._check(epoch)
        keys = self._keys.get(job_id, {})
        gone = [number for number, key in sorted(keys.items()) if number in numbers and not key.is_erased]
        for number in gone:
            keys[number] = replace(keys[number], resting=RestingKey(keys[number].resting.kek_id, b""))
        return gone

    def keys_under_others(self, kek_id: str, after: tuple[JobId, int] | None, limit: int) -> list[OwnedKey]:
        """Data keys that do not rest under this key-encryption key, by job and epoch; of those after `after`."""
        found = [
            (job_id, key)
            for job_id, keys in sorted(self._keys.items())
            for number, key in sorted(keys.items())
            if key.resting.kek_id != kek_id and not key.is_erased and (after is None or (job_id, number) > after)
        ]
        return found[:limit]

    def rewrap_keys(self, moved: Sequence[tuple[OwnedKey, RestingKey]], epoch: int) -> int:
        """Let data keys rest under another key-encryption key; how many were still as they were read."""
        self._check(epoch)
        count = 0
        for (job_id, key), resting in moved:
            if self._keys[job_id][key.epoch].resting == key.resting:
                self._keys[job_id][key.epoch] = replace(key, resting=resting)
                count += 1
        return count

    def kek_ids(self) -> frozenset[str]:
        """The key-encryption keys that some key of a job or of a data set rests under."""
        of_jobs = {k.resting.kek_id for keys in self._keys.values() for k in keys.values() if not k.is_erased}
        return frozenset({*of_jobs, *(dataset.key.kek_id for dataset in self._datasets.values())})

    def add_dataset(self, dataset: StoredDataset, epoch: int) -> StoredDataset:
        """Store a new one; the earlier one when its digest is known already."""
        self._check(epoch)
        return self._datasets.setdefault(dataset.digest, dataset)

    def datasets(self) -> list[StoredDataset]:
        """All, oldest first."""
        return sorted(self._datasets.values(), key=lambda each: (each.added_s, each.digest))

    def remove_dataset(self, digest: str, epoch: int) -> bool:
        """Erase one with its key; False if there is none."""
        self._check(epoch)
        return self._datasets.pop(digest, None) is not None

    def rewrap_dataset(self, before: StoredDataset, resting: RestingKey, epoch: int) -> int:
        """Let the key of one rest under another key-encryption key; 0 if it is not as it was read any more."""
        self._check(epoch)
        if self._datasets.get(before.digest) != before:
            return 0
        self._datasets[before.digest] = replace(before, key=resting)
        return 1

    def close(self) -> None:
        """Nothing to let go of."""

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise ConflictError(f"epoch {epoch} is over: another coordinator writes with epoch {self._epoch}")

    def _append(self, job_id: JobId, notes: Sequence[Note], now_s: float) -> None:
        log = self._events.setdefault(job_id, [])
        for note in notes:
            log.append(StoredEvent(len(log) + 1, now_s, note.name, note.round, note.message))
