"""A place for one job: a trainer that is always warm before it is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from services.worker.failures import TrainerEndedError
from services.worker.trainer_line import Trainer

StartTrainer = Callable[[], Coroutine[Any, Any, Trainer]]
"""Starts a trainer. Raises TrainerEndedError: it cannot be started."""


class TrainerSlot:
    """Keeps one trainer started; a new job gets a new one, so that memory and devices come back."""

    def __init__(self, start: StartTrainer) -> None:
        self._start = start
        self._starting: asyncio.Task[Trainer] | None = None

    def warm_up(self) -> None:
        """Start a child in the background, if there is none."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            # Whoever uses it hears of a failure; if nobody does, nobody needs to.
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def trainer(self) -> Trainer:
        """The child, alive; a new one when the last one ended or is no longer sound.

        Raises:
            TrainerEndedError: none can be started.
        """
        child = await self._current()
        if child is None or not child.is_alive or child.is_tainted:
            await self.clear()
            self.warm_up()
            child = await self._current()
        if child is None:
            raise TrainerEndedError("the trainer cannot be started")
        return child

    async def clear(self) -> None:
        """End the child."""
        task, self._starting = self._starting, None
        if task is None:
            return
        # One that is still being started is not waited for.
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is None:
            await task.result().stop()

    async def _current(self) -> Trainer | None:
        if self._starting is None:
            self.warm_up()
        assert self._starting is not None  # noqa: S101  warm_up sets it
        try:
            return await asyncio.shield(self._starting)
        except TrainerEndedError:
            self._starting = None
            raise
