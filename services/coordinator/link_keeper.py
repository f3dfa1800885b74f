"""Keeps exactly the link running that a job needs now: a round open, a list folded, or an ended job cleaned up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cortex_common.errors import CorruptError, NotFoundError
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import Seen
from services.coordinator.domain.topology import readers_of
from services.coordinator.keys import JobKeys
from services.coordinator.links import Links
from services.coordinator.network_view import NetworkView
from services.coordinator.orders import DataKeys, RoundOrder, SealOrder, Upstream
from services.coordinator.tracked import Tracked

Observe = Callable[[JobId, int, int, Callable[[Seen], Seen]], bool]


class LinkKeeper:
    """Starts and ends links as jobs move on. `observe` takes what links see, `on_cleaned` that a job left no traces."""

    def __init__(
        self,
        links: Links,
        keys: JobKeys,
        deployment: ModelDeploymentManager,
        network: NetworkView,
        epoch: int,
    ) -> None:
        self._links = links
        self._keys = keys
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

    def address(self, job: Job, tier: int | None = None) -> str:
        """Where the aggregator of a tier, or the root, is as far as known."""
        name, last = job.aggregator or NodeName(""), job.aggregator_address
        if tier is not None:
            name, last = job.tiers[tier].aggregator, job.tiers[tier].address
        return self._network.address_of(name) or last

    async def _run(self, job: Job, observe: Observe, on_cleaned: Callable[[JobId], None]) -> None:
        def note(change: Callable[[Seen], Seen]) -> None:
            observe(job.id, job.round, job.attempt, change)

        try:
            await self._work(job, note, on_cleaned)
        except (NotFoundError, CorruptError) as error:
            note(partial(replace, fatal=error.message))

    async def _work(
        self, job: Job, note: Callable[[Callable[[Seen], Seen]], None], on_cleaned: Callable[[JobId], None]
    ) -> None:
        if job.stage is Stage.COLLECTING:
            await asyncio.gather(
                *(
                    self._links.collect(self._round_order(job, tier), partial(self.address, job, tier), note)
                    for tier in (range(len(job.tiers)) if job.tiers else [None])
                )
            )
        elif job.stage is Stage.SEALED:
            await self._seal(job, note)
        else:
            if job.aggregator:
                await self._deployment.retire(job, self._epoch)
                await self._links.clean(self._deployment.leftovers(job), self._epoch)
            on_cleaned(job.id)

    async def _seal(self, job: Job, note: Callable[[Callable[[Seen], Seen]], None]) -> None:
        if not job.tiers:
            await self._links.seal(self._seal_order(job, None), partial(self.address, job), note)
            return
        orders = {index: self._seal_order(job, index) for index in range(len(job.tiers))}
        lists = {index: order for index, order in orders.items() if order.contributions}
        addresses = {index: partial(self.address, job, index) for index in lists} | {-1: partial(self.address, job)}
        await self._links.seal_tiers(self._root_order(job), lists, addresses, note)

    def _seal_order(self, job: Job, tier: int | None) -> SealOrder:
        listed = tuple(entry for entry in job.sealed if job.tier_of(entry.seat) == tier)
        return SealOrder(job.transfer_id(tier), job.round, job.attempt, self._epoch, listed, self._keys_of(job))

    def _keys_of(self, job: Job) -> DataKeys:
        """What an aggregator needs: to take updates, and to open the version they start from."""
        return self._keys.of_round(job, job.version.round if job.version else None)

    def _round_order(self, job: Job, tier: int | None) -> RoundOrder:
        """The round in which workers upload: of a tier, or of the whole job."""
        upstream = None
        if tier is not None:
            root = job.aggregator or NodeName("")
            upstream = Upstream(root, self.address(job), job.id, SeatIndex(tier))
        return RoundOrder(
            job_id=job.transfer_id(tier),
            round=job.round,
            attempt=job.attempt,
            fence=self._epoch,
            base_sha256=job.version.sha256 if job.version and job.round else "",
            seats={seat: name for seat, name in job.members.items() if job.tier_of(seat) == tier},
            spec=job.spec,
            keys=self._keys_of(job),
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            upstream=upstream,
            readers=readers_of(job, tier),
        )

    def _root_order(self, job: Job) -> RoundOrder:
        """The round in which the tiers' aggregators upload."""
        seats = {SeatIndex(index): tier.aggregator for index, tier in enumerate(job.tiers)}
        return replace(self._round_order(job, None), seats=seats, is_plain=True)
