"""Trying again while a service is away."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from cortex_common.clock import Clock
from cortex_common.errors import UnavailableError

Result = TypeVar("Result")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 3.0


class Patience:
    """How long to put up with a service that is away, since it last answered.

    Args:
        clock: What time it is.
        limit_s: Give up after this time without an answer.
        is_hopeless: Says why waiting is pointless, or None; asked at every failure.
    """

    def __init__(self, clock: Clock, limit_s: float, is_hopeless: Callable[[], str | None]) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._is_hopeless = is_hopeless
        self._since_s: float | None = None
        self._wait_s = FIRST_WAIT_S

    def answered(self) -> None:
        """The service is there: forget earlier failures."""
        self._since_s = None
        self._wait_s = FIRST_WAIT_S

    def failed(self, error: UnavailableError) -> None:
        """Wait a moment, or give up.

        Raises:
            UnavailableError: patience has run out, or there is nothing to wait for.
        """
        hopeless = self._is_hopeless()
        if hopeless is not None:
            raise UnavailableError(hopeless) from error
        now_s = self._clock.monotonic_s()
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s >= self._limit_s:
            raise error
        threading.Event().wait(random.uniform(self._wait_s / 2, self._wait_s))  # noqa: S311  # jitter, not a secret
        self._wait_s = min(self._wait_s * 2, LONGEST_WAIT_S)

    def call(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, tried again while the service is away."""
        while True:
            try:
                return attempt()
            except UnavailableError as error:
                self.failed(error)

    def stream(
        self, attempt: Callable[[], Iterator[Result]], on_away: Callable[[str], None] = lambda _: None
    ) -> Iterator[Result]:
        """Items of `attempt`, which is opened again whenever it breaks; ends when it ends."""
        while True:
            try:
                for item in attempt():
                    self.answered()
                    yield item
            except UnavailableError as error:
                on_away(error.message)
                self.failed(error)
            else:
                return
