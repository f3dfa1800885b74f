"""SealedDatasets: the sealed data sets that jobs may train on, with their keys, opened in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cortex_common.clock import Clock
from cortex_common.data.sealed import Described, described, shards_of_seat
from cortex_common.errors import AlreadyExistsError, CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.logging import get_logger
from cortex_common.security.keyring import KeyEncryption, RestingKey
from cortex_common.security.objects import DataKey
from cortex_common.security.shards import check_signature, dataset_key, shard_key
from services.coordinator.domain.job import Job
from services.coordinator.domain.seen import Dataset
from services.coordinator.keys import JobKeys
from services.coordinator.orders import SealedPart
from services.coordinator.store import Store, StoredDataset
from services.coordinator.store_thread import StoreThread

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """A data set in memory; `key` is why it cannot be opened, if it cannot."""

    stored: StoredDataset
    told: Described
    key: DataKey | NotFoundError | CorruptError


class SealedDatasets:
    """Keeps data sets and gives each seat of a job the keys of its own shards."""

    def __init__(
        self,
        network: str,
        store: StoreThread[Store],
        keys: JobKeys,
        keyring: KeyEncryption,
        clock: Clock,
        epoch: int,
    ) -> None:
        self._network = network
        self._keys = keys
        self._store = store
        self._keyring = keyring
        self._clock = clock
        self._epoch = epoch
        self._known: dict[str, dict[str, _Known]] = {}
        """By organisation, then by digest: who asks for theirs never meets another's."""
        self._parts: dict[tuple[JobId, SeatIndex], SealedPart] = {}

    async def load(self) -> None:
        """Open what is stored."""
        for stored in await self._store.call(lambda store: store.datasets()):
            try:
                self._know(await asyncio.to_thread(self._opened, stored))
            except InvalidArgumentError as error:
                # Left alone, so that everything else goes on; jobs that name it are told that there is none.
                log.error("dataset_not_readable", digest=stored.digest, reason=error.message)

    def known(self, org: str) -> Mapping[str, Dataset]:
        """What jobs of an organisation may name, as they name it."""
        return {
            each.told.reference: Dataset(
                each.told.manifest.info.input_dim, each.told.manifest.classes, len(each.told.manifest.shards)
            )
            for each in self._of(org).values()
        }

    def part(self, job: Job, seat: SeatIndex) -> SealedPart | None:
        """What a seat trains on, with the keys to it; None if that is not sealed.

        Raises:
            NotFoundError: there is no such data set for the job, or its key-encryption key is missing.
            CorruptError: its key does not open.
        """
        digest = job.spec.data.sealed_digest
        if digest is None:
            return None
        known = self._of(job.org).get(digest)
        if known is None:
            raise NotFoundError(f"data.train: there is no data set {job.spec.data.train} for jobs of {job.org}")
        key = known.key
        if not isinstance(key, DataKey):
            raise key
        # The very same object each time: orders are compared at every step.
        made = self._parts.get((job.id, seat))
        if made is None:
            shards = tuple(shards_of_seat(seat, len(job.seats), len(known.told.manifest.shards)))
            keys = tuple(shard_key(key, index) for index in shards)
            made = self._parts[job.id, seat] = SealedPart(known.stored.manifest, shards, keys)
        return made

    def forget(self, job_id: JobId) -> None:
        """A job has ended: drop the keys of its shards."""
        for place in [place for place in self._parts if place[0] == job_id]:
            del self._parts[place]

    async def add(self, manifest: str, key: bytes, org: str, who: NodeName) -> Described:
        """Make a data set known; durable when this returns. The same again changes nothing.

        Raises:
            InvalidArgumentError: manifest or key are none.
            ForbiddenError: the manifest's owner has not signed it.
            AlreadyExistsError: it is known with another key, or for another organisation.
        """
        told = described(manifest)
        check_signature(told)
        opened = dataset_key(told.manifest, key)
        resting = await self._keys.rest(told.digest, key, self._context(told))
        new = StoredDataset(told.digest, org, told.envelope.to_json(), resting, self._clock.wall_s(), who)
        try:
            stored = await self._store.call(lambda store: store.add_dataset(new, self._epoch))
        finally:
            self._keys.stored(told.digest)
        if stored is not new and stored.org == org and told.digest not in self._of(org):
            # Whoever added it had given up before it was heard that it is stored.
            self._know(await asyncio.to_thread(self._opened, stored))
        known = self._of(org).get(told.digest)
        if stored is not new and (known is None or known.key != opened):
            raise AlreadyExistsError(f"{told.reference} is known for {stored.org} already, or with another key")
        if stored is new:
            self._know(_Known(stored, told, opened))
            log.info("dataset_added", reference=told.reference, org=org, shards=len(told.manifest.shards))
        return told

    def all(self) -> Sequence[StoredDataset]:
        """Every data set, oldest first."""
        every = [each.stored for theirs in self._known.values() for each in theirs.values()]
        return sorted(every, key=lambda stored: (stored.added_s, stored.digest))

    async def remove(self, digest: str) -> Described:
        """Erase a data set's key; durable when this returns.

        Raises:
            NotFoundError: there is none.
        """
        known = next((theirs[digest] for theirs in self._known.values() if digest in theirs), None)
        if known is None:
            raise NotFoundError(f"no data set with the digest {digest[:80]!r}")
        await self._store.call(lambda store: store.remove_dataset(digest, self._epoch))
        del self._known[known.stored.org][digest]
        log.info("dataset_removed", reference=known.told.reference)
        return known.told

    async def rewrap(self, fence: int) -> int:
        """Let every key rest under the current key-encryption key; how many were moved.

        Raises:
            UnavailableError: whoever holds the key-encryption keys is away.
        """
        current, count = await asyncio.to_thread(lambda: self._keyring.current), 0
        for stored in await self._store.call(lambda store: store.datasets()):
            if stored.key.kek_id == current:
                continue
            try:
                resting = await asyncio.to_thread(self._moved, stored)
            except (NotFoundError, CorruptError, InvalidArgumentError) as error:
                log.warning("dataset_key_not_wrapped_anew", digest=stored.digest, reason=error.message)
                continue
            count += await self._store.call(
                lambda store, stored=stored, resting=resting: store.rewrap_dataset(stored, resting, fence)  # type: ignore[misc]
            )
        return count

    def _know(self, known: _Known) -> None:
        self._known.setdefault(known.stored.org, {})[known.stored.digest] = known

    def _of(self, org: str) -> Mapping[str, _Known]:
        """Those of an organisation, by their digest."""
        return self._known.get(org, {})

    def _moved(self, stored: StoredDataset) -> RestingKey:
        context = self._context(described(stored.manifest))
        return self._keyring.wrap(self._keyring.unwrap(stored.key, context), context)

    def _opened(self, stored: StoredDataset) -> _Known:
        told = described(stored.manifest)
        try:
            return _Known(
                stored, told, dataset_key(told.manifest, self._keyring.unwrap(stored.key, self._context(told)))
            )
        except (NotFoundError, CorruptError) as error:
            log.error("dataset_key_does_not_open", reference=told.reference, reason=error.message)
            return _Known(stored, told, type(error)(f"key of data set {told.reference}: {error.message}"))

    def _context(self, told: Described) -> bytes:
        return "\n".join(("cortex dataset key at rest v1", self._network, told.digest)).encode()
