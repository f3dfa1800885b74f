"""Work that goes on when who asked for it gives up, for the next who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from cortex_common.errors import CortexError

T = TypeVar("T")


class SharedWork(Generic[T]):
    """One running task, and whoever waits for what comes of it."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.task = asyncio.create_task(work)
        self._stopped: CortexError | None = None

    async def result(self) -> T:
        """What comes of it.

        Raises:
            CortexError: it failed, or was stopped.
        """
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self._stopped is not None and self.task.cancelled():
                raise self._stopped from None
            raise

    def cancel(self, error: CortexError) -> None:
        """End it soon; whoever waits for it gets the error."""
        self._stopped = error
        self.task.cancel()

    async def stop(self, error: CortexError) -> None:
        """End it and wait until it has ended."""
        self.cancel(error)
        await asyncio.wait((self.task,))
