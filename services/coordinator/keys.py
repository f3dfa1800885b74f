"""JobKeys: the data keys of jobs, opened in memory, wrapped under a key-encryption key in the store."""

from __future__ import annotations

import asyncio

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, CortexError, NotFoundError
from cortex_common.ids import JobId
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.security.keyring import KeyEncryption
from services.coordinator.store import Store, StoredKey
from services.coordinator.store_thread import StoreThread


class JobKeys:
    """Makes the data keys of jobs and keeps those of running ones open."""

    def __init__(self, network: str, store: StoreThread[Store], keyring: KeyEncryption, clock: Clock) -> None:
        self._network = network
        self._store = store
        self._keyring = keyring
        self._clock = clock
        self._open: dict[JobId, DataKey | CortexError] = {}

    async def first(self, job_id: JobId) -> StoredKey:
        """The first key of a new job, to be stored with it."""
        key = EncryptionManager.new_data_key()
        resting = await asyncio.to_thread(self._keyring.wrap, key.key, self._context(job_id, key.key_id, key.epoch))
        self._open[job_id] = key
        return StoredKey(key.key_id, key.epoch, resting, self._clock.wall_s(), "job submitted")

    def forget(self, job_id: JobId) -> None:
        """Drop from memory what belongs to a job that never came to be, or is over."""
        self._open.pop(job_id, None)

    async def load(self, job_id: JobId) -> None:
        """Open the key of a stored job, so that `get` gives it, or says what is wrong with it."""
        if isinstance(self._open.get(job_id), DataKey):
            return
        try:
            self._open[job_id] = await self._read(job_id)
        except (NotFoundError, CorruptError) as error:
            self._open[job_id] = error

    def get(self, job_id: JobId) -> DataKey:
        """The key of a job that was made or loaded.

        Raises:
            NotFoundError: it has none, or the key-encryption key is missing.
            CorruptError: it does not open.
        """
        found = self._open.get(job_id)
        if isinstance(found, DataKey):
            return found
        raise found or NotFoundError(f"job {job_id} has no data key")

    async def _read(self, job_id: JobId) -> DataKey:
        stored = await self._store.call(lambda store: store.keys(job_id))
        if not stored:
            raise NotFoundError(f"job {job_id} has no data key")
        newest = stored[-1]
        context = self._context(job_id, newest.key_id, newest.epoch)
        try:
            secret = await asyncio.to_thread(self._keyring.unwrap, newest.resting, context)
        except (NotFoundError, CorruptError) as error:
            raise type(error)(f"data key of job {job_id}: {error.message}") from error
        return DataKey(newest.key_id, newest.epoch, secret)

    def _context(self, job_id: JobId, key_id: str, epoch: int) -> bytes:
        return "\n".join(("cortex data key at rest v1", self._network, job_id, key_id, str(epoch))).encode()
