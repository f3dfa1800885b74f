"""JobKeys: the data keys of jobs by epoch, opened in memory, wrapped under a key-encryption key in the store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, CortexError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.ids import JobId, NodeName
from cortex_common.logging import get_logger
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.security.keyring import KeyEncryption, RestingKey, made_s
from services.coordinator.domain.epochs import Epoch, needed, readable
from services.coordinator.domain.job import Job
from services.coordinator.orders import DataKeys
from services.coordinator.store import OwnedKey, Store, StoredKey
from services.coordinator.store_thread import StoreThread

log = get_logger(__name__)
_FIRST = "job submitted"
_AT_ONCE = 200
_LOOK_EVERY_S = 60.0

Record = Callable[[str, str, str], None]
"""Puts into the audit log what was done, to what, and why."""


@dataclass(frozen=True, slots=True)
class OpenKey:
    """A data key in memory, and the time it is for; None once it has been erased."""

    epoch: Epoch
    key: DataKey | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that is not stored yet."""

    stored: StoredKey
    open: OpenKey

    def beginning(self, job: Job, reason: str) -> NewKey:
        """The same key for an epoch that begins with the job's present attempt, and why it does."""
        epoch = replace(self.open.epoch, from_round=job.round, from_attempt=job.attempt)
        stored = replace(self.stored, reason=reason, from_round=job.round, from_attempt=job.attempt)
        return NewKey(stored, replace(self.open, epoch=epoch))


class JobKeys:
    """Makes the data keys of jobs and keeps those of running ones open."""

    def __init__(
        self, network: str, store: StoreThread[Store], keyring: KeyEncryption, clock: Clock, record: Record
    ) -> None:
        self._record = record
        self._network = network
        self._store = store
        self._keyring = keyring
        self._clock = clock
        self._open: dict[JobId, tuple[OpenKey, ...] | CortexError] = {}
        self._unstored: dict[str, str] = {}
        self.others: list[Callable[[int], Awaitable[int]]] = []
        """Wrap anew what else rests under the key-encryption keys, and give how much that was."""

    async def rest(self, owner: str, secret: bytes, context: bytes) -> RestingKey:
        """Wrap a secret of somebody else, whose key-encryption key stays until `stored`.

        Raises:
            UnavailableError: whoever holds the key-encryption key is away.
        """
        resting = await asyncio.to_thread(self._keyring.wrap, secret, context)
        self._unstored[owner] = resting.kek_id
        return resting

    def stored(self, owner: str) -> None:
        """What was wrapped for this owner is in the store, or will never be."""
        self._unstored.pop(owner, None)

    async def first(self, job_id: JobId) -> NewKey:
        """The first key of a new job: to be stored with it, and then to `begin`.

        Raises:
            UnavailableError: whoever holds the key-encryption key is away.
        """
        return await self._new(job_id, 1, 0, 0, _FIRST)

    async def next(self, job: Job, reason: str) -> NewKey:
        """The key of an epoch that begins with the job's present attempt: to be stored, and then to `begin`.

        Raises:
            UnavailableError: whoever holds the key-encryption key is away.
        """
        return await self._new(job.id, self.newest(job.id).number + 1, job.round, job.attempt, reason)

    def begin(self, job_id: JobId, new: NewKey) -> None:
        """Use a key that has been stored."""
        earlier = self._open.get(job_id, ())
        self._open[job_id] = (*(earlier if isinstance(earlier, tuple) else ()), new.open)
        self._unstored.pop(job_id, None)
        about = f"job_id={job_id} epoch={new.stored.epoch} key_id={new.stored.key_id}"
        self._record("data key made", about, new.stored.reason)

    def forget(self, job_id: JobId) -> None:
        """Drop from memory what belongs to a job that never came to be, or is over."""
        self._open.pop(job_id, None)
        self._unstored.pop(job_id, None)

    async def load(self, job_id: JobId) -> None:
        """Open the keys of a stored job, so that they can be got, or it is known what is wrong with them."""
        try:
            self._open[job_id] = await self._read(job_id)
        except (NotFoundError, CorruptError) as error:
            self._open[job_id] = error

    def newest(self, job_id: JobId) -> Epoch:
        """The newest epoch of a running job. NotFoundError, CorruptError: as `of_round`."""
        return self._known(job_id)[-1].epoch

    def of_round(self, job: Job, oldest_round: int | None = None) -> DataKeys:
        """What a member needs for the present round of a running job.

        Args:
            job: The job.
            oldest_round: What it reads was sealed in this round or later; None: it reads nothing older.

        Raises:
            NotFoundError: there are none, or the key-encryption key is missing.
            CorruptError: one does not open.
        """
        known = self._known(job.id)
        current, older = readable([each.epoch for each in known], job, oldest_round)
        key = known[current].key
        if key is None:
            raise NotFoundError(f"job {job.id}: the data key of epoch {known[current].epoch.number} has been erased")
        return DataKeys(key, tuple(found for index in older if (found := known[index].key) is not None))

    def of_worker(self, job: Job, worker: NodeName) -> DataKeys:
        """What a worker needs; as `of_round`. What it keeps for error feedback is as old as its last that counted."""
        base = job.version.round if job.version else None
        return self.of_round(job, base if base is None else min(base, job.included.get(worker, base)))

    async def all(self, job_id: JobId) -> tuple[DataKey, ...]:
        """Every key of a job that has not been erased, whether it runs or has ended.

        Raises:
            NotFoundError: there are none, or the key-encryption key is missing.
            CorruptError: one does not open.
        """
        known = self._open.get(job_id)
        keys = known if isinstance(known, tuple) else await self._read(job_id)
        return tuple(each.key for each in keys if each.key is not None)

    async def erase(self, job: Job, kept_rounds: Iterable[int], fence: int) -> None:
        """Erase the keys that nothing of a job needs any more, in the store and in memory."""
        known = self._open.get(job.id)
        if not isinstance(known, tuple):
            return
        wanted = needed([each.epoch for each in known], job, kept_rounds)
        # By number: one that is begun meanwhile is not known here yet.
        unneeded = frozenset(each.epoch.number for each in known if each.key is not None) - wanted
        if not unneeded:
            return
        gone = await self._store.call(lambda store: store.erase_keys(job.id, unneeded, fence))
        now = self._open.get(job.id)
        if isinstance(now, tuple):
            self._open[job.id] = tuple(
                replace(each, key=None) if each.epoch.number in unneeded else each for each in now
            )
        log.info("data_keys_erased", job_id=job.id, epochs=gone)
        numbers = ",".join(map(str, gone))
        self._record("data key erased", f"job_id={job.id} epoch={numbers}", "nothing needs it any more")

    async def rewrap(self, fence: int) -> int:
        """Let every data key rest under the current key-encryption key; how many were moved. Touches no data.

        What does not open stays as it is, and so does the key-encryption key that it names. Those that nothing rests
        under any more are destroyed.

        Raises:
            UnavailableError: whoever holds the key-encryption keys is away; asked again, it goes on.
        """
        current = await asyncio.to_thread(lambda: self._keyring.current)
        count, after = 0, None
        while page := await self._store.call(partial(_page, kek_id=current, after=after)):
            after = (page[-1][0], page[-1][1].epoch)
            moved = await asyncio.to_thread(self._moved, page)
            count += await self._store.call(lambda store, moved=moved: store.rewrap_keys(moved, fence))  # type: ignore[misc]
        for others in self.others:
            count += await others(fence)
        if count:
            self._record("data keys wrapped anew", f"kek_id={current}", f"{count} of them")
        needed_keks = await self._store.call(lambda store: store.kek_ids()) | {current, *self._unstored.values()}
        for kek_id in await asyncio.to_thread(lambda: self._keyring.ids):
            # A newer one than was current at the beginning is another rotation's.
            if kek_id < current and kek_id not in needed_keks:
                await asyncio.to_thread(self._keyring.erase, kek_id)
                self._record("key-encryption key erased", f"kek_id={kek_id}", "nothing rests under it")
        return count

    async def rotate_kek(self, reason: str, fence: int) -> tuple[str, int]:
        """A new key-encryption key, and every data key under it; its id, and how many data keys were moved.

        Raises:
            PreconditionError: the file of the keys cannot be written.
            UnavailableError: whoever holds the keys is away; asked again, it goes on.
        """
        made = await asyncio.to_thread(self._keyring.rotate)
        self._record("key-encryption key made", f"kek_id={made}", reason)
        log.info("key_encryption_key_made", kek_id=made, reason=reason)
        return made, await self.rewrap(fence)

    async def keep_young(self, age_s: float, fence: int) -> None:
        """Replace the key-encryption key whenever it is so old, for ever; who holds the keys may be away meanwhile."""
        while True:
            pause_s = age_s / 4
            try:
                current = await asyncio.to_thread(lambda: self._keyring.current)
                left_s = age_s - (self._clock.wall_s() - (made_s(current) or 0.0))
                if left_s > 0:
                    pause_s = left_s
                else:
                    await self.rotate_kek(f"{age_s - left_s:.0f} s old", fence)
            except (UnavailableError, NotFoundError, PreconditionError) as error:
                log.warning("key_encryption_key_not_rotated", reason=error.message)
            await self._clock.sleep(min(_LOOK_EVERY_S, max(pause_s, 0.1)))

    def _moved(self, page: Sequence[OwnedKey]) -> list[tuple[OwnedKey, RestingKey]]:
        moved: list[tuple[OwnedKey, RestingKey]] = []
        for job_id, stored in page:
            context = self._context(job_id, stored.key_id, stored.epoch)
            try:
                secret = self._keyring.unwrap(stored.resting, context)
            except (NotFoundError, CorruptError) as error:
                log.warning("data_key_not_wrapped_anew", job_id=job_id, epoch=stored.epoch, reason=error.message)
            else:
                moved.append(((job_id, stored), self._keyring.wrap(secret, context)))
        return moved

    def _known(self, job_id: JobId) -> tuple[OpenKey, ...]:
        found = self._open.get(job_id)
        if isinstance(found, tuple):
            return found
        raise found or _none_of(job_id)

    async def _new(self, job_id: JobId, number: int, from_round: int, from_attempt: int, reason: str) -> NewKey:
        key = EncryptionManager.new_data_key(number)
        resting = await asyncio.to_thread(self._keyring.wrap, key.key, self._context(job_id, key.key_id, number))
        self._unstored[job_id] = resting.kek_id
        now_s = self._clock.wall_s()
        stored = StoredKey(key.key_id, number, resting, now_s, reason, from_round, from_attempt)
        return NewKey(stored, OpenKey(Epoch(from_round, from_attempt, number, now_s), key))

    async def _read(self, job_id: JobId) -> tuple[OpenKey, ...]:
        stored = await self._store.call(lambda store: store.keys(job_id))
        if not stored:
            raise _none_of(job_id)
        return await asyncio.to_thread(lambda: tuple(self._opened(job_id, each) for each in stored))

    def _opened(self, job_id: JobId, stored: StoredKey) -> OpenKey:
        epoch = Epoch(stored.from_round, stored.from_attempt, stored.epoch, stored.created_s)
        if stored.is_erased:
            return OpenKey(epoch, None)
        context = self._context(job_id, stored.key_id, stored.epoch)
        try:
            secret = self._keyring.unwrap(stored.resting, context)
        except (NotFoundError, CorruptError) as error:
            raise type(error)(f"data key of job {job_id}: {error.message}") from error
        return OpenKey(epoch, DataKey(stored.key_id, stored.epoch, secret))

    def _context(self, job_id: JobId, key_id: str, epoch: int) -> bytes:
        return "\n".join(("cortex data key at rest v1", self._network, job_id, key_id, str(epoch))).encode()


def _page(store: Store, *, kek_id: str, after: tuple[JobId, int] | None) -> list[OwnedKey]:
    return store.keys_under_others(kek_id, after, _AT_ONCE)


def _none_of(job_id: JobId) -> NotFoundError:
    return NotFoundError(f"job {job_id} has no data key")
