"""Resealing: everything stored of a job comes under its newest data key, and the older ones are erased."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from cortex_common.clock import Clock
from cortex_common.errors import ConflictError, CortexError, PreconditionError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.logging import get_logger
from services.coordinator.client import AggregatorPort
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain.advance import Verdict
from services.coordinator.domain.job import Job, Note, Stage
from services.coordinator.keys import JobKeys
from services.coordinator.orders import DataKeys
from services.coordinator.store import Store, StoredKey
from services.coordinator.store_thread import StoreThread
from services.coordinator.tracked import Tracked

log = get_logger(__name__)
_LONGEST_WAIT_S = 5.0
Done = Callable[[JobId, Callable[[Job], Verdict]], None]


class Resealing:
    """Has aggregators seal anew what they store: for running jobs in the background, for ended ones at once."""

    def __init__(
        self,
        store: StoreThread[Store],
        keys: JobKeys,
        aggregators: AggregatorPort,
        deployment: ModelDeploymentManager,
        clock: Clock,
        epoch: int,
    ) -> None:
        self._store = store
        self._keys = keys
        self._aggregators = aggregators
        self._deployment = deployment
        self._clock = clock
        self._epoch = epoch

    def mend(self, tracked: Tracked, tasks: asyncio.TaskGroup, done: Done) -> None:
        """Begin for a job that wants it, once a round is open under the new key: its members can open both."""
        job = tracked.job
        if job.rekey and tracked.resealing is not None and tracked.resealing.done():
            # Asked for anew: what failed once is tried again.
            tracked.resealing = None
        if not job.resealing or job.rekey or job.stage is not Stage.COLLECTING or tracked.resealing is not None:
            return

        async def work() -> None:
            try:
                number, count = await self._until_done(job)
            except ConflictError:
                raise
            except CortexError as error:
                # It stays to be done, and every key stays, until somebody asks again or the coordinator starts anew.
                log.error("job_not_resealed", job_id=job.id, reason=error.message)
            else:
                done(job.id, lambda now: resealed(now, number, count))
                tracked.resealing = None

        tracked.resealing = tasks.create_task(work())

    async def ended(self, job: Job, who: str) -> int:
        """A new data key for a job that has ended, and everything of it under that; how many versions that took.

        What was asked for before and broken off goes on, with the key that was made then.

        Raises:
            PreconditionError: it has only just ended.
            UnavailableError: an aggregator is away; asked again, it goes on.
        """
        if not job.cleaned:
            raise PreconditionError(f"job {job.id} has only just ended and is being cleaned up; ask again in a moment")
        await self._keys.load(job.id)
        try:
            begun = job if self._was_begun(job) else await self._begin(job, who)
            number, count = await self._once(job)
            verdict = resealed(begun, number, count)
            await self._commit(begun, verdict.job, verdict.notes[0], [])
            await self._keys.erase(verdict.job, self._deployment.kept(job), self._epoch)
        finally:
            self._keys.forget(job.id)
        return count

    def _was_begun(self, job: Job) -> bool:
        """Whether the newest key was made after the job's end, and not everything is under it yet."""
        newest = self._keys.newest(job.id)
        return job.resealing and (newest.from_round, newest.from_attempt) > (job.round, job.attempt)

    async def _begin(self, job: Job, who: str) -> Job:
        new = await self._keys.next(replace(job, attempt=job.attempt + 1), f"asked for by {who}, to reseal")
        begun = replace(job, resealing=True)
        note = Note("data_key_rotated", job.round, f"epoch {new.stored.epoch}: {new.stored.reason}")
        await self._commit(job, begun, note, [new.stored])
        self._keys.begin(job.id, new)
        return begun

    async def _commit(self, before: Job, after: Job, note: Note, keys: list[StoredKey]) -> None:
        now_s = self._clock.wall_s()
        await self._store.call(lambda store: store.commit(before, after, [note], self._epoch, now_s, keys))

    async def _until_done(self, job: Job) -> tuple[int, int]:
        wait_s = 0.1
        while True:
            try:
                return await self._once(job)
            except UnavailableError as error:
                log.info("reseal_waits", job_id=job.id, reason=error.message)
                await self._clock.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _once(self, job: Job) -> tuple[int, int]:
        """The epoch that everything is under now, and how many versions were not."""
        *older, newest = await self._keys.all(job.id)
        keys, count = DataKeys(newest, tuple(older)), 0
        for left in self._deployment.leftovers(job):
            if left.job_id == job.id:
                count += await self._aggregators.reseal(left.server(), job.id, self._epoch, keys)
        return newest.epoch, count


def resealed(job: Job, number: int, count: int) -> Verdict:
    """The job once everything stored of it is under this epoch, or a later one."""
    note = Note("job_resealed", job.round, f"{count} versions are under the data key of epoch {number} now")
    return Verdict(replace(job, resealing=False, sealed_since=max(job.sealed_since, number)), (note,))
