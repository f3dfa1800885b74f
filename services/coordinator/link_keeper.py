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
from services.coordinator.links import Junction, Leaf, Links
from services.coordinator.network_view import NetworkView
from services.coordinator.orders import DataKeys, RoundOrder, Server, Upstream
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

    def server(self, job: Job, tier: int | None = None) -> Server:
        """The aggregator of a tier, or the root, where it is as far as known."""
        name, last = job.aggregator or NodeName(""), job.aggregator_address
        if tier is not None:
            name, last = job.tiers[tier].aggregator, job.tiers[tier].address
        return Server(name, self._network.address_of(name) or last)

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
            # A root above tiers is opened once they have something for it: it has the versions without that.
            first = [self._tier(job, index) for index in job.below(None)] or [self._tier(job, None)]
            await asyncio.gather(*(self._links.collect(each, note) for each in first))
        elif job.stage is Stage.SEALED:
            await self._links.seal(self._tier(job, None), note)
        else:
            if job.aggregator:
                await self._deployment.retire(job, self._epoch)
                await self._links.clean(self._deployment.leftovers(job), self._epoch)
            on_cleaned(job.id)

    def _tier(self, job: Job, tier: int | None) -> Leaf | Junction:
        """A tier, or the root, with all that is below it."""
        order, server = self._round_order(job, tier), partial(self.server, job, tier)
        below = {index: self._tier(job, index) for index in job.below(tier)}
        if below:
            return Junction(order, server, below)
        return Leaf(order, server, tuple(entry for entry in job.sealed if job.tier_of(entry.seat) == tier))

    def _keys_of(self, job: Job) -> DataKeys:
        """What an aggregator needs: to take updates, and to open the version they start from."""
        return self._keys.of_round(job, job.version.round if job.version else None)

    def _round_order(self, job: Job, tier: int | None) -> RoundOrder:
        """The round of a tier, or of the whole job, in which workers upload, or the aggregators of the tiers below."""
        below = {SeatIndex(index): job.tiers[index].aggregator for index in job.below(tier)}
        return RoundOrder(
            job_id=job.transfer_id(tier),
            round=job.round,
            attempt=job.attempt,
            fence=self._epoch,
            base_sha256=job.version.sha256 if job.version and job.round else "",
            seats=below or {seat: name for seat, name in job.members.items() if job.tier_of(seat) == tier},
            spec=job.spec,
            keys=self._keys_of(job),
            chunk_elements=DEFAULT_CHUNK_ELEMENTS,
            is_plain=bool(below),
            upstream=partial(self._upstream, job, tier) if tier is not None else None,
            readers=readers_of(job, tier),
        )

    def _upstream(self, job: Job, tier: int) -> Upstream:
        above = job.tiers[tier].above
        server = self.server(job, above)
        return Upstream(server.name, server.address, job.transfer_id(above), SeatIndex(tier), job.id)
