"""Where jobs stand, for all nodes that work on them: one watch a job, however many look."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from cortex_common.errors import CortexError
from cortex_common.ids import JobId
from cortex_common.job.status import JobStatus
from cortex_common.security.tokens import Principal, Scope
from services.gateway.client import JobClient

# Which jobs a node may ask about, its own assignments say, not an organisation.
_PRINCIPAL = Principal("", "nodes", frozenset({Scope.ADMIN}))


@dataclass(slots=True)
class _Watch:
    """A job being watched, for so many."""

    task: asyncio.Task[None] | None = None
    latest: JobStatus | None = None
    is_over: bool = False
    lookers: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class StatusBoard:
    """Follows a job while somebody looks."""

    def __init__(self, jobs: JobClient) -> None:
        self._jobs = jobs
        self._watches: dict[JobId, _Watch] = {}

    async def status(self, job_id: JobId) -> JobStatus:
        """Where a job stands, with its whole history.

        Raises:
            CortexError: the coordinator does not know it, or is away.
        """
        return await self._jobs.status(job_id, _PRINCIPAL)

    async def follow(self, job_id: JobId) -> AsyncIterator[JobStatus]:
        """The job's status now and at each change; of its history, only the newest round. Ends with the watch."""
        watch = self._watches.setdefault(job_id, _Watch())
        if watch.task is None:
            watch.task = asyncio.create_task(self._keep(job_id, watch))
        watch.lookers += 1
        seen: JobStatus | None = None
        try:
            while True:
                async with watch.changed:
                    while watch.latest is seen and not watch.is_over:
                        await watch.changed.wait()
                if watch.latest is seen or watch.latest is None:
                    return
                seen = watch.latest
                yield seen
        finally:
            watch.lookers -= 1
            if not watch.lookers:
                if self._watches.get(job_id) is watch:
                    del self._watches[job_id]
                watch.task.cancel()

    async def _keep(self, job_id: JobId, watch: _Watch) -> None:
        try:
            async with aclosing(self._jobs.watch(job_id, _PRINCIPAL)) as statuses:
                async for status in statuses:
                    watch.latest = status.model_copy(update={"history": status.history[-1:]})
                    async with watch.changed:
                        watch.changed.notify_all()
        except CortexError:
            pass  # each looker has a line of its own to the coordinator, which says what is wrong
        finally:
            watch.is_over = True
            if self._watches.get(job_id) is watch:
                del self._watches[job_id]
            async with watch.changed:
                watch.changed.notify_all()
