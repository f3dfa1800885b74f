"""Keeps a job's aggregators doing what the job needs: opening and watching its rounds, folding them, cleaning up.

Each link runs until it is cancelled or its work is done, through restarts of the aggregators. A job's rounds are a
tree: the root's, and those of the tiers below it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from cortex_common.clock import Clock
from cortex_common.errors import (
    ConflictError,
    CorruptError,
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    PreconditionError,
)
from services.coordinator.client import AggregatorPort, Forwarded, Progress
from services.coordinator.domain.job import Contribution
from services.coordinator.domain.seen import Activity, AggregatedVersion, Hop, Seen
from services.coordinator.orders import Leftover, RoundOrder, SealOrder, Server

T = TypeVar("T")
Observe = Callable[[Callable[[Seen], Seen]], None]
Where = Callable[[], Server]
_LONGEST_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Leaf:
    """A round in which workers upload; `listed` is its part of the frozen list, once there is one."""

    order: RoundOrder
    server: Where
    listed: tuple[Contribution, ...] = ()

    @property
    def has_updates(self) -> bool:
        """Whether there is anything to pass on."""
        return bool(self.listed)


@dataclass(frozen=True, slots=True)
class Junction:
    """A round in which the tiers below it upload: each is a seat, its index the seat's."""

    order: RoundOrder
    server: Where
    below: Mapping[int, Leaf | Junction]

    @property
    def has_updates(self) -> bool:
        """Whether anything below has something to pass on."""
        return any(tier.has_updates for tier in self.below.values())


class Links:
    """The kinds of link."""

    def __init__(self, aggregators: AggregatorPort, clock: Clock) -> None:
        self._aggregators = aggregators
        self._clock = clock

    async def collect(self, tier: Leaf | Junction, observe: Observe) -> None:
        """Open the round, then those below it, and report what workers send, until cancelled.

        Raises:
            ConflictError: another coordinator rules.
        """
        if not tier.order.seats:
            # Whoever would upload there has been dropped from the round; the others go on without.
            return
        is_open = asyncio.Event()

        async def collect_below(other: Leaf | Junction) -> None:
            # Its aggregator fetches the version it lacks from here.
            await is_open.wait()
            await self.collect(other, observe)

        below = tier.below.values() if isinstance(tier, Junction) else ()
        await asyncio.gather(self._collect(tier, is_open, observe), *map(collect_below, below))

    async def seal(self, root: Leaf | Junction, observe: Observe) -> None:
        """Have every tier's list pushed to the one above it, the root's folded, and report the version.

        Args:
            root: The job's own round.
            observe: Told what comes of it.

        Raises:
            ConflictError: another coordinator rules.
        """
        forwarded: dict[int, Forwarded] = {}

        async def make() -> AggregatedVersion:
            order = await self._frozen(root, forwarded, observe)
            return await self._aggregators.seal_round(root.server(), order)

        try:
            made = await self._until_through(make, observe)
        except (PreconditionError, CorruptError) as error:
            observe(partial(replace, spoilt=error.message))
        except (InvalidArgumentError, ForbiddenError) as error:
            observe(partial(replace, fatal=f"round {root.order.round} cannot be folded: {error.message}"))
        else:
            hops = {index: Hop(each.contribution.size_bytes, each.relayed_bytes) for index, each in forwarded.items()}
            observe(partial(replace, aggregated=replace(made, hops=hops), trouble=None))

    async def clean(self, leftovers: Sequence[Leftover], fence: int) -> None:
        """Erase what an ended job no longer needs, however long its aggregators are away."""
        await asyncio.gather(*(self._clean(left, fence) for left in leftovers))

    async def _clean(self, left: Leftover, fence: int) -> None:
        wait_s = 0.1
        while True:
            try:
                await self._aggregators.clean(left.server(), left.job_id, fence, left.keep, ended=True)
            except ConflictError:
                raise
            except CortexError:
                wait_s = await self._rest(wait_s)
            else:
                return

    async def _collect(self, tier: Leaf | Junction, is_open: asyncio.Event, observe: Observe) -> None:
        wait_s, order = 0.1, tier.order
        while True:
            try:
                await self._aggregators.open_round(tier.server(), order)
                is_open.set()
                observe(partial(_opened, tier))
                async for progress in self._aggregators.watch_round(tier.server(), order):
                    wait_s = 0.1
                    if isinstance(tier, Leaf):
                        observe(partial(self._with_progress, progress))
            except ConflictError:
                raise
            except CortexError as error:
                if _is_hopeless(error) or isinstance(error, PreconditionError):
                    observe(partial(replace, fatal=f"round {order.round} cannot be opened: {error.message}"))
                    return
                self._trouble(error, observe)
            wait_s = await self._rest(wait_s)

    async def _frozen(self, tier: Leaf | Junction, forwarded: dict[int, Forwarded], observe: Observe) -> SealOrder:
        """The tier's list: of a junction, once everything below has been forwarded to it."""
        order, listed = tier.order, tier.listed if isinstance(tier, Leaf) else ()
        if isinstance(tier, Junction):
            await self._aggregators.open_round(tier.server(), order)
            keeper = asyncio.create_task(self._keep_open(order, tier.server))
            try:
                below = {index: each for index, each in tier.below.items() if each.has_updates}
                await _all(self._forward(index, each, forwarded, observe) for index, each in below.items())
            finally:
                keeper.cancel()
            listed = tuple(forwarded[index].contribution for index in sorted(below))
        return SealOrder(order.job_id, order.round, order.attempt, order.fence, listed, order.keys)

    async def _forward(
        self, index: int, tier: Leaf | Junction, forwarded: dict[int, Forwarded], observe: Observe
    ) -> None:
        """Have a tier's list pushed one tier up, after those below it."""
        asked = False

        async def push() -> Forwarded:
            nonlocal asked
            if asked and isinstance(tier, Leaf):
                # Which says where the aggregator above is by now; a junction's round is opened each time anyway.
                await self._aggregators.open_round(tier.server(), tier.order)
            asked = True
            order = await self._frozen(tier, forwarded, observe)
            return await self._aggregators.forward_round(tier.server(), order)

        forwarded[index] = await self._until_through(push, observe)

    async def _keep_open(self, order: RoundOrder, server: Where) -> None:
        """Open a round again whenever its aggregator comes back without its key, until it is frozen, or cancelled."""
        wait_s = 0.1
        while True:
            try:
                async for _ in self._aggregators.watch_round(server(), order):
                    wait_s = 0.1
                return
            except CortexError:
                wait_s = await self._rest(wait_s)
                with suppress(CortexError):
                    await self._aggregators.open_round(server(), order)

    async def _until_through(self, attempt: Callable[[], Awaitable[T]], observe: Observe) -> T:
        """What comes of it, asked for again while another time may help.

        Raises:
            ConflictError: another coordinator rules.
            PreconditionError, CorruptError: the attempt of the round must be made again.
            InvalidArgumentError, ForbiddenError: it can only fail.
        """
        wait_s = 0.1
        while True:
            try:
                return await attempt()
            except (ConflictError, PreconditionError, CorruptError):
                raise
            except CortexError as error:
                if _is_hopeless(error):
                    raise
                self._trouble(error, observe)
                wait_s = await self._rest(wait_s)

    def _with_progress(self, progress: Progress, seen: Seen) -> Seen:
        now_s = self._clock.monotonic_s()
        fresh = {seat: entry for seat, entry in progress.accepted.items() if seat not in seen.accepted}
        activities = dict(seen.activities)
        for seat, share in progress.received.items():
            known = activities.get(seat)
            if known is not None and known.words.startswith("uploading"):
                activities[seat] = Activity(known.worker, f"uploading {share:.0%}", known.since_s)
        return replace(
            seen,
            accepted={**seen.accepted, **fresh},
            accepted_at={**seen.accepted_at, **dict.fromkeys(fresh, now_s)},
            activities=activities,
            trouble=None,
        )

    def _trouble(self, error: CortexError, observe: Observe) -> None:
        observe(partial(replace, trouble=error.message))

    async def _rest(self, wait_s: float) -> float:
        await self._clock.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
        return min(wait_s * 2, _LONGEST_WAIT_S)


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Wait for all; the first that fails ends the others."""
    running = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.gather(*running)
    finally:
        for each in running:
            each.cancel()


def _opened(tier: Leaf | Junction, seen: Seen) -> Seen:
    """Workers may upload to a leaf."""
    seats = tier.order.seats if isinstance(tier, Leaf) else {}
    return replace(seen, open_seats={**seen.open_seats, **seats}, trouble=None)


def _is_hopeless(error: CortexError) -> bool:
    """Whether the very same call can only fail again."""
    return isinstance(error, InvalidArgumentError | ForbiddenError)
