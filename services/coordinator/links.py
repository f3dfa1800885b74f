"""Keeps a job's aggregator doing what the job needs: opening and watching a round, folding it, cleaning up.

Each link runs until it is cancelled or its work is done, through restarts of the aggregator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
from cortex_common.ids import JobId
from services.coordinator.client import AggregatorPort, Progress
from services.coordinator.domain.seen import Activity, Seen
from services.coordinator.orders import RoundOrder, SealOrder

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
                observe(partial(replace, open_seats=dict(order.seats), trouble=None))
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
        wait_s = 0.1
        while True:
            try:
                made = await self._aggregators.seal_round(address(), order)
            except ConflictError:
                raise
            except (PreconditionError, CorruptError) as error:
                observe(partial(replace, spoilt=error.message))
                return
            except CortexError as error:
                if _is_hopeless(error):
                    observe(partial(replace, fatal=f"round {order.round} cannot be folded: {error.message}"))
                    return
                self._trouble(error, observe)
                wait_s = await self._rest(wait_s)
            else:
                observe(partial(replace, aggregated=made, trouble=None))
                return

    async def clean(self, job_id: JobId, fence: int, keep: Sequence[int], address: Address) -> None:
        """Erase what an ended job no longer needs, however long its aggregator is away."""
        wait_s = 0.1
        while True:
            try:
                await self._aggregators.clean(address(), job_id, fence, keep)
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


def _is_hopeless(error: CortexError) -> bool:
    """Whether the very same call can only fail again."""
    return isinstance(error, InvalidArgumentError | ForbiddenError)
