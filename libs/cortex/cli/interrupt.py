"""Ctrl-C that comes at a place that can bear it.

Python raises KeyboardInterrupt between any two steps of the main thread: in the middle of gRPC's bookkeeping that
leaves a lock held for ever, and inside a callback of the interpreter it is lost. So while a stream is followed or
processes have to be stopped, a signal is noted, and raised where the main thread waits; streams are read on another
thread.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StoppedError(Exception):
    """Unwinds the reading thread when nobody wants its items any more."""


class Interrupt:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted; a second one raises KeyboardInterrupt on the spot."""

    def __init__(self) -> None:
        # Its put may be called from a signal handler that interrupted its get.
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._is_noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Go on if no signal has come.

        Raises:
            KeyboardInterrupt: one has.
        """
        if self._is_noted:
            raise KeyboardInterrupt

    def read(self, produce: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
        """What `produce`, run on another thread, hands to its argument; ends when it returns, raises what it raises.

        Raises:
            KeyboardInterrupt: a signal came; `produce` is told at its next item.
        """
        is_wanted = True

        def put(item: Item) -> None:
            if not is_wanted:
                raise _StoppedError
            self._queue.put(item)

        pool = ThreadPoolExecutor(1)
        pool.submit(produce, put).add_done_callback(self._queue.put)
        pool.shutdown(wait=False)
        try:
            while True:
                self.check()
                item = self._queue.get()
                if isinstance(item, Future):
                    item.result()
                    return
                if item is not self:
                    yield item
        finally:
            is_wanted = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_noted:
            raise KeyboardInterrupt
        self._is_noted = True
        self._queue.put(self)
