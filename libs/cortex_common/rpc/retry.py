"""Try again while a peer is away."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from tenacity.stop import stop_base

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import UnavailableError

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0


class _Limit(stop_base):
    """Stops after a time by the given clock, after a number of attempts, or when the caller has had enough."""

    def __init__(
        self, clock: Clock, within_s: float | None, attempts: int | None, enough: Callable[[], bool] | None
    ) -> None:
        self._clock = clock
        self._enough = enough
        self._attempts = attempts
        self._end_s = None if within_s is None else clock.monotonic_s() + within_s

    def __call__(self, retry_state: RetryCallState) -> bool:
        if self._attempts is not None and retry_state.attempt_number >= self._attempts:
            return True
        if self._enough is not None and self._enough():
            return True
        return self._end_s is not None and self._clock.monotonic_s() >= self._end_s


def backoff(
    clock: Clock | None = None,
    *,
    within_s: float | None = None,
    attempts: int | None = None,
    enough: Callable[[], bool] | None = None,
    on_wait: Callable[[UnavailableError, float], None] | None = None,
) -> AsyncRetrying:
    """Repeat while UnavailableError is raised; wait 0 to 0.2 s, 0 to 0.4 s … 0 to 10 s in between (full jitter).

    `async for attempt in backoff(clock): with attempt: …`, or `await backoff(clock)(function, argument)`.

    Args:
        clock: Does the waiting.
        within_s: Give up when this much time has passed; never, if None.
        attempts: Give up after so many; never, if None.
        enough: Asked after each failure: give up now?
        on_wait: Told the error and the seconds until the next attempt.

    Raises:
        UnavailableError: the last one, on giving up. Any other error at once.
    """
    clock = clock or SystemClock()

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if on_wait and isinstance(error, UnavailableError):
            on_wait(error, state.upcoming_sleep)

    return AsyncRetrying(
        retry=retry_if_exception_type(UnavailableError),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=_Limit(clock, within_s, attempts, enough),
        sleep=clock.sleep,
        before_sleep=before_sleep,
        reraise=True,
    )
