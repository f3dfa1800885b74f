"""Leases: which nodes are known, and what their silence means. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cortex_common.errors import AlreadyExistsError, ForbiddenError, InvalidArgumentError, Violation
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName

_JITTER = 1.1


class Health(StrEnum):
    """What the lease of a node says about it."""

    LIVE = "live"
    SUSPECT = "suspect"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """How long silence is borne, in seconds."""

    lease_s: float = 10.0
    heartbeat_s: float = 3.0
    forget_s: float = 3600.0

    def __post_init__(self) -> None:
        """Refuse rules under which a punctual node could be suspected."""
        if not 0 < self.suspect_s < self.lease_s:
            raise InvalidArgumentError.of(
                "lease rules",
                [
                    Violation(
                        "lease_s", f"{self.lease_s} given; allowed: more than 2.2 x heartbeat_s ({self.suspect_s:g})"
                    )
                ],
            )
        if self.forget_s <= 0:
            raise InvalidArgumentError.of(
                "lease rules", [Violation("forget_s", f"{self.forget_s} given; allowed: > 0")]
            )

    @property
    def suspect_s(self) -> float:
        """Silence after which two heartbeats are missing, even with their jitter of 10 %."""
        return 2 * self.heartbeat_s * _JITTER


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says of itself. `description` is the whole message as received: opaque here."""

    name: NodeName
    role: Role
    region: str
    address: str
    incarnation: str
    description: bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """A node and its lease: `renewed_s`, `expired_s` (None until then) are monotonic, `seen_wall_s` is for people."""

    node: Announcement
    renewed_s: float
    seen_wall_s: float
    expired_s: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """A node as others see it; `lease_left_s` is negative once the lease has run out."""

    node: Announcement
    health: Health
    lease_left_s: float
    seen_wall_s: float


@dataclass(frozen=True, slots=True)
class Remembered:
    """A node as a snapshot holds it, in wall seconds since monotonic ones mean nothing to the next process."""

    node: Announcement
    seen_wall_s: float
    expired_wall_s: float | None


class Event(StrEnum):
    """What can happen to the membership."""

    JOINED = "node_joined"
    REPLACED = "node_replaced"
    MOVED = "node_moved"
    REVIVED = "node_revived"
    SUSPECTED = "node_suspected"
    EXPIRED = "node_expired"
    LEFT = "node_left"
    FORGOTTEN = "node_forgotten"


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to the membership, and why, in words fit for a log line."""

    event: Event
    name: NodeName
    role: Role
    region: str
    reason: str


@dataclass(slots=True)
class Registry:
    """The nodes known. Every method first lets time take effect, and returns what changed.

    A silence counts only while the registry was listening: after a start, and after a gap in which it was not asked to
    look (process stopped, machine suspended), nobody is expired before one whole lease has passed.
    """

    rules: LeaseRules
    listening_since_s: float
    leases: dict[NodeName, Lease] = field(default_factory=dict)
    _seen_s: float = field(init=False)
    _suspected: set[NodeName] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start listening."""
        self._seen_s = self.listening_since_s

    @property
    def patience_s(self) -> float:
        """A longer pause between two calls means that the registry itself was away."""
        return self.rules.heartbeat_s

    def heartbeat(self, node: Announcement, now_s: float, wall_s: float) -> list[Change]:
        """Renew the lease of a node, or take it in.

        Raises:
            AlreadyExistsError: a node of another role holds the name.
        """
        changes = self.advance(now_s)
        held = self.leases.get(node.name)
        if held and held.expired_s is None and held.node.role != node.role:
            raise AlreadyExistsError(f"the name {node.name!r} is in use by the {held.node.role.value} of this network")
        self.leases[node.name] = Lease(node, now_s, wall_s)
        verdict = _verdict(held, node, suspected=node.name in self._suspected, now_s=now_s)
        self._suspected.discard(node.name)
        return [*changes, verdict] if verdict else changes

    def leave(self, name: NodeName, role: Role, incarnation: str, now_s: float) -> list[Change]:
        """End a lease at once; without effect for a node that is unknown or was replaced."""
        changes = self.advance(now_s)
        held = self.leases.get(name)
        if held is None or (held.node.role, held.node.incarnation) != (role, incarnation):
            return changes
        del self.leases[name]
        self._suspected.discard(name)
        return [*changes, _change(Event.LEFT, held.node, "said goodbye")]

    def shut_out(self, name: NodeName, role: Role, now_s: float) -> list[Change]:
        """Expire a node's lease at once: it was revoked."""
        changes = self.advance(now_s)
        held = self.leases.get(name)
        if held is None or held.node.role is not role or held.expired_s is not None:
            return changes
        self.leases[name] = replace(held, expired_s=now_s)
        self._suspected.discard(name)
        return [*changes, _change(Event.EXPIRED, held.node, "revoked")]

    def advance(self, now_s: float) -> list[Change]:
        """Let time take effect: suspect, expire, forget."""
        if now_s - self._seen_s > self.patience_s:
            self.listening_since_s = now_s
        self._seen_s = max(self._seen_s, now_s)
        return [change for lease in list(self.leases.values()) if (change := self._age(lease, now_s))]

    def _age(self, lease: Lease, now_s: float) -> Change | None:
        name, silence_s = lease.node.name, self._silence_s(lease, now_s)
        if lease.expired_s is not None:
            if now_s - lease.expired_s < self.rules.forget_s:
                return None
            del self.leases[name]
            return _change(Event.FORGOTTEN, lease.node, f"expired for {self.rules.forget_s:g} s")
        if silence_s >= self.rules.lease_s:
            self.leases[name] = replace(lease, expired_s=now_s)
            self._suspected.discard(name)
            return _change(Event.EXPIRED, lease.node, f"silent for {silence_s:.1f} s, lease {self.rules.lease_s:g} s")
        if silence_s >= self.rules.suspect_s and name not in self._suspected:
            self._suspected.add(name)
            return _change(Event.SUSPECTED, lease.node, f"silent for {silence_s:.1f} s: two heartbeats missed")
        return None

    def _silence_s(self, lease: Lease, now_s: float) -> float:
        return now_s - max(lease.renewed_s, self.listening_since_s)

    def view(self, now_s: float, role: Role | None = None, region: str | None = None) -> tuple[View, ...]:
        """The nodes as of the last `advance`, by name; None selects all roles or regions."""
        return tuple(
            self._view(lease, now_s)
            for _, lease in sorted(self.leases.items())
            if role in (None, lease.node.role) and region in (None, lease.node.region)
        )

    def _view(self, lease: Lease, now_s: float) -> View:
        if lease.expired_s is not None:
            return View(lease.node, Health.EXPIRED, min(lease.expired_s - now_s, 0.0), lease.seen_wall_s)
        health = Health.SUSPECT if lease.node.name in self._suspected else Health.LIVE
        return View(lease.node, health, self.rules.lease_s - self._silence_s(lease, now_s), lease.seen_wall_s)


def _verdict(held: Lease | None, node: Announcement, *, suspected: bool, now_s: float) -> Change | None:
    """What a heartbeat means for the membership; None for a plain renewal."""
    if held is None:
        return _change(Event.JOINED, node, "first heartbeat")
    if held.node.incarnation != node.incarnation:
        return _change(Event.REPLACED, node, f"incarnation {node.incarnation} instead of {held.node.incarnation}")
    if held.expired_s is not None:
        return _change(Event.REVIVED, node, f"heartbeat {now_s - held.expired_s:.1f} s after its lease ran out")
    if suspected:
        return _change(Event.REVIVED, node, f"heartbeat after {now_s - held.renewed_s:.1f} s")
    if (held.node.region, held.node.address) != (node.region, node.address):
        return _change(Event.MOVED, node, f"now at {node.address or 'no address'} in {node.region}")
    return None


def _change(event: Event, node: Announcement, reason: str) -> Change:
    return Change(event, node.name, node.role, node.region, reason)


def authorise(caller: Identity, name: str, role: Role | None, action: str) -> None:
    """A node speaks only for itself.

    Raises:
        ForbiddenError: name or role differ from the caller's certificate.
    """
    if caller.name == name and role in (None, caller.role):
        return
    given = f"{role.value} {name!r}" if role else repr(name)
    raise ForbiddenError(f"{action}: {given} given; the caller's certificate says {caller.role.value} {caller.name!r}")


def remembered(registry: Registry, now_s: float, wall_s: float) -> tuple[Remembered, ...]:
    """The registry as it should be found again by `restored`."""
    return tuple(
        Remembered(
            lease.node, lease.seen_wall_s, None if lease.expired_s is None else wall_s - (now_s - lease.expired_s)
        )
        for lease in registry.leases.values()
    )


def restored(rules: LeaseRules, memory: Iterable[Remembered], now_s: float, wall_s: float) -> Registry:
    """The registry after a restart.

    Args:
        rules: How long silence is borne.
        memory: The nodes known before.
        now_s: Monotonic seconds; nodes that had not expired get one whole lease from here.
        wall_s: The same moment on the wall clock.
    """
    registry = Registry(rules, now_s)
    for item in memory:
        ago_s = None if item.expired_wall_s is None else max(0.0, wall_s - item.expired_wall_s)
        expired_s = None if ago_s is None else now_s - ago_s
        registry.leases[item.node.name] = Lease(item.node, now_s, item.seen_wall_s, expired_s)
    return registry
