"""Which role may call which RPC. What is not listed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cortex_common.errors import ForbiddenError
from cortex_common.identity import Identity, Role

_PACKAGE = "cortex.v1"
_PEOPLE = frozenset({Role.OPERATOR, Role.GATEWAY})
_WORKER = frozenset({Role.WORKER})
_COORDINATOR = frozenset({Role.COORDINATOR})
_PUSHERS = frozenset({Role.WORKER, Role.AGGREGATOR})
_PULLERS = frozenset({Role.WORKER, Role.AGGREGATOR, Role.COORDINATOR})
_NODES = frozenset({Role.COORDINATOR, Role.DISCOVERY, Role.AGGREGATOR, Role.WORKER, Role.GATEWAY})
_OPERATOR = frozenset({Role.OPERATOR})
_GATEWAY = frozenset({Role.GATEWAY})
_ALL = frozenset(Role)
_NOBODY: frozenset[Role] = frozenset()
_WATCHERS = frozenset({Role.COORDINATOR, Role.GATEWAY, Role.OPERATOR})

_TABLE: Mapping[str, Mapping[str, frozenset[Role]]] = {
    "JobService": {
        "SubmitJob": _PEOPLE,
        "GetJob": _PEOPLE,
        "ListJobs": _PEOPLE,
        "WatchJob": _PEOPLE,
        "CancelJob": _PEOPLE,
        "PauseJob": _PEOPLE,
        "ResumeJob": _PEOPLE,
        "WatchEvents": _PEOPLE,
        "ListVersions": _PEOPLE,
        "DownloadModel": _PEOPLE,
    },
    "KeyService": {"ListKeys": _OPERATOR, "RotateDataKey": _OPERATOR, "RotateKeyEncryptionKey": _OPERATOR},
    "DatasetService": {"AddDataset": _OPERATOR, "ListDatasets": _OPERATOR, "RemoveDataset": _OPERATOR},
    "AssignmentService": {"Attend": _WORKER, "Report": _WORKER},
    "RoundService": {
        "GetSealingKey": _COORDINATOR,
        "OpenRound": _COORDINATOR,
        "WatchRound": _COORDINATOR,
        "SealRound": _COORDINATOR,
        "ForwardRound": _COORDINATOR,
        "AbortRound": _COORDINATOR,
        "PruneJob": _COORDINATOR,
        "ResealJob": _COORDINATOR,
    },
    "WeightService": {"PushUpdate": _PUSHERS, "PullModel": _PULLERS},
    "ShardService": {"OfferShard": _OPERATOR, "PutShard": _OPERATOR, "DropShards": _OPERATOR},
    "DiscoveryService": {
        "Heartbeat": _NODES,
        "Leave": _NODES,
        "ListNodes": _WATCHERS,
        "WatchNodes": _WATCHERS,
    },
    "EnrollmentService": {"GetRoots": _NOBODY, "Enroll": _NOBODY},
    "IdentityService": {
        "Renew": _ALL,
        "WatchTrust": _ALL,
        "CreateJoinToken": _OPERATOR,
        "CreateNodeToken": _OPERATOR,
        "ChallengeNode": _GATEWAY,
        "AdmitNode": _GATEWAY,
        "ListIdentities": _OPERATOR,
        "RevokeNode": _OPERATOR,
        "RotateAuthority": _OPERATOR,
    },
}

# For callers who have no certificate yet; served at a port of their own, and by no role.
ANYBODY = frozenset({f"/{_PACKAGE}.EnrollmentService/GetRoots", f"/{_PACKAGE}.EnrollmentService/Enroll"})

# What a gateway may do for a node it has a pass for, and then is allowed what the node is: nothing else of a worker's.
RELAYED = frozenset(
    f"/{_PACKAGE}.{method}"
    for method in (
        "AssignmentService/Attend",
        "AssignmentService/Report",
        "WeightService/PushUpdate",
        "WeightService/PullModel",
        "DiscoveryService/Heartbeat",
        "DiscoveryService/Leave",
    )
)

# What changes the network, a job or who may do so, and what takes a model out: each call is in the audit log.
PRIVILEGED = frozenset(
    f"/{_PACKAGE}.{method}"
    for method in (
        "JobService/SubmitJob",
        "JobService/CancelJob",
        "JobService/PauseJob",
        "JobService/ResumeJob",
        "JobService/DownloadModel",
        "KeyService/RotateDataKey",
        "KeyService/RotateKeyEncryptionKey",
        "DatasetService/AddDataset",
        "DatasetService/RemoveDataset",
        "ShardService/PutShard",
        "ShardService/DropShards",
        "EnrollmentService/Enroll",
        "IdentityService/Renew",
        "IdentityService/CreateJoinToken",
        "IdentityService/CreateNodeToken",
        "IdentityService/RevokeNode",
        "IdentityService/RotateAuthority",
    )
)

# What is only looked at, and what nodes do for jobs all day: of these the refusals are in the audit log.
ROUTINE = frozenset(
    f"/{_PACKAGE}.{method}"
    for method in (
        "JobService/GetJob",
        "JobService/ListJobs",
        "JobService/WatchJob",
        "JobService/WatchEvents",
        "JobService/ListVersions",
        "KeyService/ListKeys",
        "DatasetService/ListDatasets",
        "AssignmentService/Attend",
        "AssignmentService/Report",
        "RoundService/GetSealingKey",
        "RoundService/OpenRound",
        "RoundService/WatchRound",
        "RoundService/SealRound",
        "RoundService/ForwardRound",
        "RoundService/AbortRound",
        "RoundService/PruneJob",
        "RoundService/ResealJob",
        "WeightService/PushUpdate",
        "WeightService/PullModel",
        "ShardService/OfferShard",
        "DiscoveryService/Heartbeat",
        "DiscoveryService/Leave",
        "DiscoveryService/ListNodes",
        "DiscoveryService/WatchNodes",
        "EnrollmentService/GetRoots",
        "IdentityService/WatchTrust",
        "IdentityService/ChallengeNode",
        "IdentityService/AdmitNode",
        "IdentityService/ListIdentities",
    )
)

# Answers that take as long as folding, forwarding, sealing anew or reading what there is: only coordinators and
# operators may ask, and say how long they wait.
PATIENT = frozenset(
    f"/{_PACKAGE}.{method}"
    for method in (
        "RoundService/SealRound",
        "RoundService/ForwardRound",
        "RoundService/ResealJob",
        "ShardService/OfferShard",
        "KeyService/RotateDataKey",
        "KeyService/RotateKeyEncryptionKey",
    )
)

# Full method name, as gRPC passes it, to the roles that may call it.
ALLOWED: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        f"/{_PACKAGE}.{service}/{method}": roles
        for service, methods in _TABLE.items()
        for method, roles in methods.items()
    }
)

# Standard services that any node of the network may ask.
OPEN_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)


def allowed_roles(method: str) -> frozenset[Role]:
    """Roles that may call `method` (`/package.Service/Method`); none when it is not declared."""
    if method.strip("/").partition("/")[0] in OPEN_SERVICES:
        return frozenset(Role)
    return ALLOWED.get(method, frozenset())


def authorise(identity: Identity, method: str) -> None:
    """Refuse a caller whose role is not listed for `method`.

    Raises:
        ForbiddenError: not listed; says who may.
    """
    roles = allowed_roles(method)
    if identity.role in roles:
        return
    who = ", ".join(sorted(roles)) if roles else "nobody (the RPC is not in the authorisation table)"
    raise ForbiddenError(f"{identity.role} {identity.name!r} may not call {method}; allowed: {who}", "role")
