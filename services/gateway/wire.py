"""Nodes on the wire and as shown: the only file of this service that knows both (jobs: cortex_common.job.wire)."""

from __future__ import annotations

from cortex_common.errors import CortexError
from cortex_common.identity import Role
from cortex_common.job.wire import moment
from cortex_common.pb.v1 import common_pb2
from services.gateway.domain import DatasetInfo, GpuInfo, Health, NodeInfo, ResourceInfo

_ROLES = {common_pb2.Role.Value(f"ROLE_{role.name}"): role for role in Role}
_HEALTH = {common_pb2.NodeHealth.Value(f"NODE_HEALTH_{health.name}"): health for health in Health}


def node_from_proto(message: common_pb2.Node) -> NodeInfo:
    """Read a node.

    Raises:
        CortexError: discovery speaks of a role or a health this gateway does not know (another version).
    """
    if message.role not in _ROLES or message.health not in _HEALTH:
        raise CortexError(f"node {message.name!r} has an unknown role {message.role} or health {message.health}")
    return NodeInfo(
        name=message.name,
        role=_ROLES[message.role],
        region=message.region,
        address=message.address,
        health=_HEALTH[message.health],
        activity=message.activity,
        version=message.version,
        lease_left_s=round(message.lease_left_s, 3),
        last_seen_at=moment(message, "last_seen_at"),
        started_at=moment(message, "started_at"),
        resources=_resources(message.resources),
        datasets=tuple(_dataset(dataset) for dataset in message.datasets),
    )


def _resources(message: common_pb2.Resources) -> ResourceInfo:
    return ResourceInfo(
        cpu_cores=message.cpu_cores,
        cpu_utilisation=message.cpu_utilisation,
        memory_bytes=message.memory_bytes,
        memory_available_bytes=message.memory_available_bytes,
        disk_free_bytes=message.disk_free_bytes,
        network_sent_bytes=message.network_sent_bytes,
        network_received_bytes=message.network_received_bytes,
        gpus=tuple(
            GpuInfo(
                name=gpu.name,
                memory_bytes=gpu.memory_bytes,
                memory_used_bytes=gpu.memory_used_bytes,
                utilisation=gpu.utilisation,
            )
            for gpu in message.gpus
        ),
        slots=message.slots,
        free_slots=message.free_slots,
    )


def _dataset(message: common_pb2.DatasetInfo) -> DatasetInfo:
    return DatasetInfo(
        name=message.name,
        input_shape=tuple(message.input_shape),
        classes=message.classes,
        examples=message.examples,
    )
