"""Blocking stores off the event loop: one thread, so that a database with one connection has one user."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

_Store = TypeVar("_Store")
_Result = TypeVar("_Result")


class StoreThread(Generic[_Store]):
    """Runs calls to a store one after another on a thread of its own."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def call(self, function: Callable[[_Store], _Result]) -> _Result:
        """The function's result; once begun it is carried out even if the caller is cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, self._store)

    def close(self) -> None:
        """Wait for the last call and end the thread."""
        self._executor.shutdown(wait=True)
