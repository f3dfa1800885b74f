"""Keeps exactly the link running that a job needs now: a round open, a list folded, or an ended job cleaned up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from cortex_common.ids import JobId, NodeName
from cortex_common.security.keyring import FileKeyring
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import Seen
from services.coordinator.links import Links
from services.coordinator.network_view import NetworkView
from services.coordinator.orders import RoundOrder, SealOrder
from services.coordinator.tracked import Tracked

Observe = Callable[[JobId, int, int, Callable[[Seen], Seen]], bool]


class LinkKeeper:
    """Starts and ends links as jobs move on. `observe` takes what links see, `on_cleaned` that a job left no traces."""

    def __init__(
        self,
        links: Links,
        keyring: FileKeyring,
        deployment: ModelDeploymentManager,
        network: NetworkView,
        epoch: int,
    ) -> None:
        self._links = links
        self._keyring = keyring
        self._deployment = deployment
        self._network = network
        self._epoch = epoch

    def mend(
        self, tracked: Tracked, tasks: asyncio.TaskGroup, observe: Observe, on_cleaned: Callable[[JobId], None]
    ) -> None:
        """Replace the job's link if it needs another now."""
        wanted = tracked.wanted_link()
        if wanted == tracked.link_key:
            return
        if tracked.link is not None:
            tracked.link.cancel()
        tracked.link_key = wanted
        tracked.link = None
        if wanted is not None:
            tracked.link = tasks.create_task(self._run(tracked.job, observe, on_cleaned))

    def address(self, job: Job) -> str:
        """Where the job's aggregator is, as far as known."""
        return self._network.address_of(job.aggregator or NodeName("")) or job.aggregator_address

    async def _run(self, job: Job, observe: Observe, on_cleaned: Callable[[JobId], None]) -> None:
        address = partial(self.address, job)

        def note(change: Callable[[Seen], Seen]) -> None:
            observe(job.id, job.round, job.attempt, change)

        if job.stage is Stage.COLLECTING:
            await self._links.collect(self._round_order(job), address, note)
        elif job.stage is Stage.SEALED:
            key = self._keyring.get(job.id)
            order = SealOrder(job.id, job.round, job.attempt, self._epoch, job.sealed, key)
            await self._links.seal(order, address, note)
        else:
            if job.aggregator:
                await self._deployment.retire(job, self._epoch)
                await self._links.clean(job.id, self._epoch, sorted(self._deployment.kept(job)), address)
            on_cleaned(job.id)

    def _round_order(self, job: Job) -> RoundOrder:
        base = job.version.sha256 if job.version and job.round else ""
        key, chunk = self._keyring.get(job.id), DEFAULT_CHUNK_ELEMENTS
        return RoundOrder(job.id, job.round, job.attempt, self._epoch, base, job.members, job.spec, key, chunk)
