"""Nodes on the wire and in the domain: the only file of this service that knows both."""

from __future__ import annotations

from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.identity import REGION, Role
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import common_pb2
from services.discovery.domain import Announcement, Health, View

_LIMITS = {"address": 255, "incarnation": 64, "version": 64, "activity": 512}
_MAX_DATASETS = 1000
_MAX_GPUS = 64

ROLES = {
    common_pb2.ROLE_COORDINATOR: Role.COORDINATOR,
    common_pb2.ROLE_DISCOVERY: Role.DISCOVERY,
    common_pb2.ROLE_AGGREGATOR: Role.AGGREGATOR,
    common_pb2.ROLE_WORKER: Role.WORKER,
    common_pb2.ROLE_GATEWAY: Role.GATEWAY,
    common_pb2.ROLE_OPERATOR: Role.OPERATOR,
}
_HEALTH = {
    Health.LIVE: common_pb2.NODE_HEALTH_LIVE,
    Health.SUSPECT: common_pb2.NODE_HEALTH_SUSPECT,
    Health.EXPIRED: common_pb2.NODE_HEALTH_EXPIRED,
}


def announcement_from_proto(node: common_pb2.Node) -> Announcement:
    """What a heartbeat says, checked.

    Raises:
        InvalidArgumentError: lists every field that is missing, too long or not allowed.
    """
    mistakes = [
        Violation(f"node.{name}", f"{len(getattr(node, name))} characters given; allowed: up to {limit}")
        for name, limit in _LIMITS.items()
        if len(getattr(node, name)) > limit
    ]
    if not node.name:
        mistakes.append(Violation("node.name", "missing; allowed: the name in the caller's certificate"))
    if node.role not in ROLES:
        mistakes.append(Violation("node.role", f"{node.role} given; allowed: {', '.join(Role)}"))
    if not REGION.fullmatch(node.region):
        mistakes.append(
            Violation("node.region", f"{node.region!r} given; allowed: 1 to 63 letters, digits, '.', '_' and '-'")
        )
    if not node.incarnation:
        mistakes.append(Violation("node.incarnation", "missing; allowed: any text that is new at each start"))
    if len(node.datasets) > _MAX_DATASETS:
        mistakes.append(Violation("node.datasets", f"{len(node.datasets)} given; allowed: up to {_MAX_DATASETS}"))
    if len(node.resources.gpus) > _MAX_GPUS:
        mistakes.append(
            Violation("node.resources.gpus", f"{len(node.resources.gpus)} given; allowed: up to {_MAX_GPUS}")
        )
    if mistakes:
        raise InvalidArgumentError.of("heartbeat", mistakes)
    return Announcement(
        name=NodeName(node.name),
        role=ROLES[node.role],
        region=node.region,
        address=node.address,
        incarnation=node.incarnation,
        description=node.SerializeToString(deterministic=True),
    )


def node_to_proto(view: View) -> common_pb2.Node:
    """A node as others are told of it: its own words, and what discovery adds to them."""
    node = common_pb2.Node.FromString(view.node.description)
    node.health = _HEALTH[view.health]
    node.lease_left_s = view.lease_left_s
    node.last_seen_at.FromNanoseconds(int(view.seen_wall_s * 1e9))
    return node


def role_from_proto(role: common_pb2.Role.ValueType) -> Role | None:
    """The role to select; None for all.

    Raises:
        InvalidArgumentError: no such role.
    """
    if role == common_pb2.ROLE_UNSPECIFIED:
        return None
    if role not in ROLES:
        raise InvalidArgumentError.of("nodes", [Violation("role", f"{role} given; allowed: {', '.join(Role)}")])
    return ROLES[role]
