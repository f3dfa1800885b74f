"""NodeDiscoveryService: the registry with a clock, a snapshot and people who watch it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, InvalidArgumentError, UnavailableError, Violation
from cortex_common.identity import Identity, Role
from cortex_common.logging import get_logger
from cortex_common.rpc.denial import Denial
from services.discovery import metrics
from services.discovery.domain import (
    Announcement,
    Change,
    Event,
    LeaseRules,
    Registry,
    View,
    authorise,
    remembered,
    restored,
)
from services.discovery.store import SnapshotStore

log = get_logger(__name__)

_REFRESH_S = (0.2, 3600.0)
_QUIET = frozenset({Event.JOINED, Event.LEFT, Event.FORGOTTEN, Event.MOVED})


class NodeDiscoveryService:
    """Who is in the network and how healthy: takes heartbeats, lets leases run out, tells whoever watches.

    >>> from cortex import NodeDiscoveryService
    >>> from cortex_common.clock import SystemClock
    >>> from cortex_common.identity import Identity, Role
    >>> from services.discovery.domain import Announcement, LeaseRules
    >>> from services.discovery.store import MemorySnapshotStore
    >>> discovery = NodeDiscoveryService.restore(LeaseRules(lease_s=10), SystemClock(), MemorySnapshotStore())
    >>> caller = Identity("cortex", Role.WORKER, "gpu-7")  # from its certificate
    >>> discovery.heartbeat(caller, Announcement("gpu-7", Role.WORKER, "eu", "", "one", b""))
    >>> [(view.node.name, view.node.region, view.health.value) for view in discovery.nodes(region="eu")]
    [('gpu-7', 'eu', 'live')]
    >>> discovery.leave(caller, "gpu-7", "one")
    >>> discovery.nodes()
    ()
    """

    def __init__(self, registry: Registry, clock: Clock, store: SnapshotStore) -> None:
        self._registry = registry
        self._clock = clock
        self._store = store
        self._watchers: set[asyncio.Event] = set()
        self._unsaved = asyncio.Event()
        self._closed = False

    @classmethod
    def restore(cls, rules: LeaseRules, clock: Clock, store: SnapshotStore) -> NodeDiscoveryService:
        """Take up where the last process ended; without a readable snapshot, wait for heartbeats."""
        try:
            memory = store.load()
        except CorruptError as error:
            log.warning("snapshot_unreadable", reason=error.message, effect="nodes appear with their next heartbeat")
            memory = ()
        registry = restored(rules, memory, clock.monotonic_s(), clock.wall_s())
        log.info("registry_restored", nodes=len(memory), grace_s=rules.lease_s)
        return cls(registry, clock, store)

    @property
    def rules(self) -> LeaseRules:
        """How long silence is borne."""
        return self._registry.rules

    def heartbeat(self, caller: Identity, node: Announcement) -> None:
        """Renew the caller's lease, or take it in.

        Raises:
            ForbiddenError: name or role differ from the caller's certificate.
            AlreadyExistsError: a node of another role holds the name.
        """
        authorise(caller, node.name, node.role, "heartbeat")
        metrics.HEARTBEATS.labels(role=node.role.value).inc()
        self._apply(self._registry.heartbeat(node, self._clock.monotonic_s(), self._clock.wall_s()))

    def leave(self, caller: Identity, name: str, incarnation: str) -> None:
        """End the caller's lease at once; idempotent.

        Raises:
            ForbiddenError: the name is not the caller's.
        """
        authorise(caller, name, None, "leave")
        self._apply(self._registry.leave(caller.name, caller.role, incarnation, self._clock.monotonic_s()))

    def identities(self, network: str) -> tuple[Identity, ...]:
        """Who is known by heartbeats."""
        return tuple(Identity(network, view.node.role, view.node.name) for view in self.nodes())

    def shut_out(self, denials: Iterable[Denial]) -> None:
        """Expire everybody who is shut out."""
        for denial in denials:
            if not denial.serials:
                now_s = self._clock.monotonic_s()
                self._apply(self._registry.shut_out(denial.identity.name, denial.identity.role, now_s))

    def nodes(self, role: Role | None = None, region: str | None = None) -> tuple[View, ...]:
        """Every node known, expired ones included until they are forgotten; None selects all."""
        now_s = self._clock.monotonic_s()
        self._apply(self._registry.advance(now_s))
        return self._registry.view(now_s, role, region)

    async def watch(self, role: Role | None, refresh_s: float) -> AsyncIterator[tuple[View, ...]]:
        """The whole list now, at each change of membership or health, and at least every `refresh_s`.

        Raises:
            InvalidArgumentError: `refresh_s` is not allowed.
        """
        checked_refresh(refresh_s)
        changed = asyncio.Event()
        self._watchers.add(changed)
        metrics.WATCHERS.set(len(self._watchers))
        try:
            while not self._closed:
                changed.clear()
                yield self.nodes(role)
                await self._first(changed, refresh_s)
        finally:
            self._watchers.discard(changed)
            metrics.WATCHERS.set(len(self._watchers))

    async def sweep_forever(self, every_s: float) -> None:
        """Let time take effect, whether or not anybody calls."""
        while True:
            self.nodes()
            self._measure()
            await self._clock.sleep(every_s)

    async def save_forever(self, every_s: float) -> None:
        """Write a snapshot at each change, and every `every_s` for the times of last heartbeats."""
        while True:
            self._unsaved.clear()
            await self.save()
            await self._first(self._unsaved, every_s)

    async def save(self) -> None:
        """Write a snapshot; a disk or database that refuses costs only the memory of a restart, so it is borne."""
        memory = remembered(self._registry, self._clock.monotonic_s(), self._clock.wall_s())
        try:
            await asyncio.to_thread(self._store.save, memory)
        except (OSError, UnavailableError) as error:
            metrics.SNAPSHOT_FAILURES.inc()
            log.warning(
                "snapshot_failed", reason=str(error), effect="after a restart nodes appear with their heartbeats"
            )

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        self._wake()

    def _apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            level = log.info if change.event in _QUIET else log.warning
            level(change.event.value, node=change.name, role=change.role, region=change.region, reason=change.reason)
            metrics.CHANGES.labels(event=change.event.value).inc()
        if changes:
            self._measure()
            self._unsaved.set()
            self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def _measure(self) -> None:
        metrics.measure_nodes(self._registry.view(self._clock.monotonic_s()))

    async def _first(self, event: asyncio.Event, seconds: float) -> None:
        """Return when the event is set or the time has passed."""
        waits = {asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._clock.sleep(seconds))}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def checked_refresh(refresh_s: float) -> float:
    """The time after which a watcher wants to hear again.

    Raises:
        InvalidArgumentError: it is not allowed.
    """
    low, high = _REFRESH_S
    if not low <= refresh_s <= high:
        message = f"{refresh_s} given; allowed: {low} to {high:g}, or 0 for 3"
        raise InvalidArgumentError.of("watch", [Violation("refresh_s", message)])
    return refresh_s
