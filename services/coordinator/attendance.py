"""The open lines to workers: who attends, who was lost when, and what each was last told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from cortex_common.clock import Clock
from cortex_common.ids import NodeName
from cortex_common.logging import get_logger
from services.coordinator.orders import Order
from services.coordinator.signal import Signal

log = get_logger(__name__)
_FORGET_S = 3600.0


@dataclass(slots=True)
class Line:
    """One worker's line."""

    region: str
    incarnation: str
    slots: int
    lost_since_s: float | None = None
    replaced: bool = False
    changed: Signal = field(default_factory=Signal)


class Attendance:
    """Lines by worker. Tells `on_change` when somebody comes or goes."""

    def __init__(self, clock: Clock, on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._lines: dict[NodeName, Line] = {}
        self._orders: Mapping[NodeName, tuple[Order, ...]] = {}

    @property
    def lines(self) -> Mapping[NodeName, Line]:
        """Everybody who attends or did within the last hour."""
        return self._lines

    def is_replaced(self, worker: NodeName, incarnation: str) -> bool:
        """Whether a newer process of the worker has taken the line over; not so before either has called."""
        line = self._lines.get(worker)
        return line is not None and line.incarnation != incarnation

    def give(self, orders: Mapping[NodeName, tuple[Order, ...]]) -> None:
        """Replace what every worker has to do; those for whom it differs are told."""
        before, self._orders = self._orders, orders
        for worker, line in self._lines.items():
            if before.get(worker, ()) != orders.get(worker, ()):
                line.changed.notify()

    async def attend(
        self, worker: NodeName, region: str, incarnation: str, slots: int
    ) -> AsyncIterator[tuple[Order, ...]]:
        """The worker's orders now and at each change, until a newer line of the same worker replaces this one."""
        earlier = self._lines.get(worker)
        if earlier is not None:
            earlier.replaced = True
            earlier.changed.notify()
        line = Line(region, incarnation, slots)
        self._lines[worker] = line
        log.info("worker_attends", worker=worker, region=region, incarnation=incarnation)
        self._on_change()
        try:
            told: tuple[Order, ...] | None = None
            while not line.replaced:
                orders = self._orders.get(worker, ())
                if orders != told:
                    told = orders
                    yield orders
                else:
                    await line.changed.wait()
        finally:
            if not line.replaced:
                line.lost_since_s = self._clock.monotonic_s()
                log.info("worker_lost", worker=worker)
            self._forget()
            self._on_change()

    def _forget(self) -> None:
        now_s = self._clock.monotonic_s()
        for worker, line in list(self._lines.items()):
            if line.lost_since_s is not None and now_s - line.lost_since_s > _FORGET_S:
                del self._lines[worker]
