"""Who may call what: deny by default, and no RPC forgotten."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import cortex_common.pb.v1 as generated
from cortex_common.errors import ForbiddenError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.rpc.authorisation import ALLOWED, PRIVILEGED, RELAYED, ROUTINE, allowed_roles, authorise

OP, GW, W, C, A, D = Role.OPERATOR, Role.GATEWAY, Role.WORKER, Role.COORDINATOR, Role.AGGREGATOR, Role.DISCOVERY
EXPECTED = {
    "JobService": {OP, GW},
    "KeyService": {OP},
    "DatasetService": {OP},
    "ShardService": {OP},
    "AssignmentService": {W},
    "RoundService": {C},
    "WeightService/PushUpdate": {W, A},
    "WeightService/PullModel": {W, A, C},
    "DiscoveryService/Heartbeat": {C, D, A, W, GW},
    "DiscoveryService/Leave": {C, D, A, W, GW},
    "DiscoveryService/ListNodes": {C, GW, OP},
    "DiscoveryService/WatchNodes": {C, GW, OP},
    "EnrollmentService": set(),
    "IdentityService/Renew": set(Role),
    "IdentityService/WatchTrust": set(Role),
    "IdentityService/CreateJoinToken": {OP},
    "IdentityService/CreateNodeToken": {OP},
    "IdentityService/ChallengeNode": {GW},
    "IdentityService/AdmitNode": {GW},
    "IdentityService/ListIdentities": {OP},
    "IdentityService/RevokeNode": {OP},
    "IdentityService/RotateAuthority": {OP},
}


def every_rpc() -> Iterator[str]:
    for module in pkgutil.iter_modules(generated.__path__):
        if not module.name.endswith("_pb2"):
            continue
        descriptor = importlib.import_module(f"{generated.__name__}.{module.name}").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}"


def identity(role: Role) -> Identity:
    return Identity("cortex", role, NodeName("n1"))


def test_a_gateway_may_do_for_a_node_only_what_workers_may_do() -> None:
    for method in RELAYED:
        authorise(identity(W), method)
    assert not any("IdentityService" in method for method in RELAYED), "or it could become the worker"


def test_every_rpc_is_declared_and_nothing_else_is() -> None:
    rpcs = set(every_rpc())
    assert len(rpcs) > 20
    assert rpcs == set(ALLOWED), "declare each RPC in rpc/authorisation.py"


def test_every_rpc_is_either_privileged_or_routine() -> None:
    assert set(ALLOWED) == PRIVILEGED | ROUTINE, "say in rpc/authorisation.py whether its calls are recorded"
    assert not PRIVILEGED & ROUTINE


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", sorted(every_rpc()))
def test_each_role_is_allowed_or_refused_as_designed(method: str, role: Role) -> None:
    service, name = method.rsplit(".", 1)[1].split("/")
    allowed = EXPECTED[service] if service in EXPECTED else EXPECTED[f"{service}/{name}"]
    if role in allowed:
        authorise(identity(role), method)
    else:
        with pytest.raises(ForbiddenError, match=f"{role} 'n1' may not call {method}; allowed: "):
            authorise(identity(role), method)


@pytest.mark.parametrize("method", ["/cortex.v1.JobService/DropEverything", "/cortex.v2.JobService/GetJob", "", "/x"])
def test_what_is_not_declared_is_refused_to_everybody(method: str) -> None:
    assert not allowed_roles(method)
    for role in Role:
        with pytest.raises(ForbiddenError, match="not in the authorisation table"):
            authorise(identity(role), method)


@pytest.mark.parametrize("role", Role)
def test_health_and_reflection_are_open_to_every_node(role: Role) -> None:
    authorise(identity(role), "/grpc.health.v1.Health/Check")
    authorise(identity(role), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
