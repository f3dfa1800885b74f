"""The network as the coordinator sees it: discovery's list, kept while discovery is away, and the workers' lines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cortex_common.clock import Clock
from cortex_common.errors import CortexError
from cortex_common.identity import Role
from cortex_common.ids import NodeName
from cortex_common.logging import get_logger
from cortex_common.pb.v1 import common_pb2
from cortex_common.rpc.denial import DenyList
from services.coordinator import wire
from services.coordinator.attendance import Attendance
from services.coordinator.client import DiscoveryClient
from services.coordinator.domain.seen import AggregatorView, WorkerView, World

log = get_logger(__name__)


class NetworkView:
    """Puts together what discovery and the lines say."""

    def __init__(
        self,
        clock: Clock,
        attendance: Attendance,
        on_change: Callable[[], None],
        lease_s: float = 10.0,
        denied: DenyList | None = None,
    ) -> None:
        self._denied = denied or DenyList()
        self._clock = clock
        self._lease_s = lease_s
        self._missing_since_s: dict[NodeName, float] = {}
        self._attendance = attendance
        self._on_change = on_change
        self._started_s = clock.monotonic_s()
        self._workers: Mapping[NodeName, WorkerView] = {}
        self._aggregators: Mapping[NodeName, AggregatorView] = {}
        self.is_fresh = False

    async def follow(self, discovery: DiscoveryClient) -> None:
        """Keep the list up to date, for ever; without discovery the last list stays and nobody expires."""
        wait_s = 0.2
        while True:
            try:
                async for nodes in discovery.watch():
                    wait_s = 0.2
                    self.take(nodes)
            except CortexError as error:
                if self.is_fresh or wait_s == 0.2:
                    log.warning("discovery_away", reason=error.message)
            self._grow_stale()
            await self._clock.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects
            wait_s = min(wait_s * 2, 5.0)

    def take(self, nodes: Sequence[common_pb2.Node]) -> None:
        """A new list from discovery."""
        by_role: dict[Role | None, list[common_pb2.Node]] = {}
        for node in nodes:
            by_role.setdefault(wire.role_of(node), []).append(node)
        self._workers = {NodeName(node.name): wire.worker_of(node) for node in by_role.get(Role.WORKER, [])}
        self._aggregators = self._with_missing([wire.aggregator_of(node) for node in by_role.get(Role.AGGREGATOR, [])])
        self.is_fresh = True
        self._on_change()

    def world(self, taken: frozenset[NodeName], expected: Iterable[NodeName]) -> World:
        """Everybody.

        Args:
            taken: Workers without a free place.
            expected: Holders of seats: after a restart they count as lost since then, not as unknown.
        """
        shut_out = self._denied.names(Role.WORKER)
        names = {*self._workers, *self._attendance.lines, *expected}
        workers = {name: self._view(name, is_revoked=name in shut_out) for name in names}
        revoked = self._denied.names(Role.AGGREGATOR)
        aggregators = {
            name: replace(view, is_live=view.is_live and name not in revoked)
            for name, view in self._aggregators.items()
        }
        return World(workers, aggregators, taken, revoked=revoked)

    def address_of(self, aggregator: NodeName) -> str | None:
        """Where an aggregator is now, as far as known."""
        view = self._aggregators.get(aggregator)
        return view.address if view else None

    def slots(self, name: NodeName) -> int:
        """Jobs a worker can train at a time."""
        line = self._attendance.lines.get(name)
        return line.slots if line else 1

    def _with_missing(self, told: Sequence[AggregatorView]) -> Mapping[NodeName, AggregatorView]:
        """Those told of, and for a lease longer those no longer told of: a restarted discovery learns of them again."""
        now_s = self._clock.monotonic_s()
        views = {view.name: view for view in told}
        for name, view in self._aggregators.items():
            if name not in views:
                since_s = self._missing_since_s.setdefault(name, now_s)
                views[name] = replace(view, is_live=view.is_live and now_s - since_s < self._lease_s)
        self._missing_since_s = {name: since_s for name, since_s in self._missing_since_s.items() if name in views}
        for view in told:
            self._missing_since_s.pop(view.name, None)
        return views

    def _view(self, name: NodeName, *, is_revoked: bool) -> WorkerView:
        known = self._workers.get(name) or WorkerView(name, "", slots=1, is_known=False)
        if is_revoked:
            known = replace(known, is_revoked=True)
        line = self._attendance.lines.get(name)
        if line is None:
            return replace(known, lost_since_s=self._started_s)
        return replace(known, region=line.region, slots=line.slots, lost_since_s=line.lost_since_s)

    def _grow_stale(self) -> None:
        self.is_fresh = False
        self._workers = {
            name: replace(worker, is_expired=False, is_suspect=False) for name, worker in self._workers.items()
        }
