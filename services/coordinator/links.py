"""Keeps a job's aggregator doing what the job needs: opening and watching a round, folding it, cleaning up.

Each link runs until it is cancelled or its work is done, through restarts of the aggregator.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

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
from services.coordinator.domain.seen import Activity, AggregatedVersion, Seen
from services.coordinator.orders import Leftover, RoundOrder, SealOrder

Observe = Callable[[Callable[[Seen], Seen]], None]
Address = Callable[[], str]
_LONGEST_WAIT_S = 5.0


class Links:
    """The three kinds of link."""

    def __init__(self, aggregators: AggregatorPort, clock: Clock) -> None:
        self._aggregators = aggregators
        self._clock = clock

    async def collect(self, order: RoundOrder, address: Address, observe: Observe) -> None:
        """Open the round and report what arrives, until cancelled.

        Raises:
            ConflictError: another coordinator rules.
        """
        wait_s = 0.1
        while True:
            try:
                await self._aggregators.open_round(address(), order)
                observe(partial(_opened, order))
                async for progress in self._aggregators.watch_round(address(), order):
                    wait_s = 0.1
                    observe(partial(self._with_progress, progress))
            except ConflictError:
                raise
            except CortexError as error:
                if _is_hopeless(error) or isinstance(error, PreconditionError):
                    observe(partial(replace, fatal=f"round {order.round} cannot be opened: {error.message}"))
                    return
                self._trouble(error, observe)
            wait_s = await self._rest(wait_s)

    async def seal(self, order: SealOrder, address: Address, observe: Observe) -> None:
        """Have the list folded and report the version.

        Raises:
            ConflictError: another coordinator rules.
        """
        await self._until_made(lambda: self._aggregators.seal_round(address(), order), order.round, observe)

    async def seal_tiers(
        self, root: RoundOrder, tiers: Mapping[int, SealOrder], addresses: Mapping[int, Address], observe: Observe
    ) -> None:
        """Have every tier's list pushed to the root, the root's list folded, and report the version.

        Args:
            root: The root's round; its seats are the tiers.
            tiers: The frozen list of each tier that has one.
            addresses: Of each tier's aggregator; of the root's under -1.
            observe: Told what comes of it.

        Raises:
            ConflictError: another coordinator rules.
        """

        async def make() -> AggregatedVersion:
            await self._aggregators.open_round(addresses[-1](), root)
            calls = [self._aggregators.forward_round(addresses[index](), order) for index, order in tiers.items()]
            keeper = asyncio.create_task(self._keep_open(root, addresses[-1]))
            try:
                forwarded = await asyncio.gather(*calls)
            finally:
                keeper.cancel()
            listed = tuple(sorted((each.contribution for each in forwarded), key=lambda entry: entry.seat))
            crossed = {int(each.contribution.seat): _crossed_bytes(each) for each in forwarded}
            order = SealOrder(root.job_id, root.round, root.attempt, root.fence, listed, root.keys)
            made = await self._aggregators.seal_round(addresses[-1](), order)
            return replace(made, crossed_bytes=crossed)

        await self._until_made(make, root.round, observe)

    async def _keep_open(self, order: RoundOrder, address: Address) -> None:
        """Open a round again whenever its aggregator comes back without its key, until cancelled."""
        wait_s = 0.1
        while True:
            try:
                async for _ in self._aggregators.watch_round(address(), order):
                    wait_s = 0.1
                await self._aggregators.open_round(address(), order)
            except CortexError:
                wait_s = await self._rest(wait_s)
                with suppress(CortexError):
                    await self._aggregators.open_round(address(), order)

    async def _until_made(
        self, make: Callable[[], Awaitable[AggregatedVersion]], round_number: int, observe: Observe
    ) -> None:
        wait_s = 0.1
        while True:
            try:
                made = await make()
            except ConflictError:
                raise
            except (PreconditionError, CorruptError) as error:
                observe(partial(replace, spoilt=error.message))
                return
            except CortexError as error:
                if _is_hopeless(error):
                    observe(partial(replace, fatal=f"round {round_number} cannot be folded: {error.message}"))
                    return
                self._trouble(error, observe)
                wait_s = await self._rest(wait_s)
            else:
                observe(partial(replace, aggregated=made, trouble=None))
                return

    async def clean(self, leftovers: Sequence[Leftover], fence: int) -> None:
        """Erase what an ended job no longer needs, however long its aggregators are away."""
        await asyncio.gather(*(self._clean(left, fence) for left in leftovers))

    async def _clean(self, left: Leftover, fence: int) -> None:
        wait_s = 0.1
        while True:
            try:
                await self._aggregators.clean(left.address(), left.job_id, fence, left.keep, ended=True)
            except ConflictError:
                raise
            except CortexError:
                wait_s = await self._rest(wait_s)
            else:
                return

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


def _crossed_bytes(tier: Forwarded) -> int:
    return tier.contribution.size_bytes + tier.relayed_bytes


def _opened(order: RoundOrder, seen: Seen) -> Seen:
    return replace(seen, open_seats={**seen.open_seats, **order.seats}, trouble=None)


def _is_hopeless(error: CortexError) -> bool:
    """Whether the very same call can only fail again."""
    return isinstance(error, InvalidArgumentError | ForbiddenError)
