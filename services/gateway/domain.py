"""The network as people see it: nodes by region, what is wrong, and what is free. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from cortex_common.identity import Role

_ESSENTIAL = (Role.COORDINATOR, Role.AGGREGATOR, Role.WORKER)


class Health(StrEnum):
    """What the lease of a node says about it."""

    LIVE = "live"
    SUSPECT = "suspect"
    EXPIRED = "expired"


class Overall(StrEnum):
    """Health of a region or of the network."""

    OK = "ok"
    DEGRADED = "degraded"


class Shown(BaseModel):
    """Base of everything shown: immutable."""

    model_config = ConfigDict(frozen=True)


class GpuInfo(Shown):
    """One accelerator; utilisation 0 to 1."""

    name: str
    memory_bytes: int
    memory_used_bytes: int
    utilisation: float


class ResourceInfo(Shown):
    """What a node has and how busy it is; utilisation 0 to 1."""

    cpu_cores: int = 0
    cpu_utilisation: float = 0.0
    memory_bytes: int = 0
    memory_available_bytes: int = 0
    disk_free_bytes: int = 0
    network_sent_bytes: int = 0
    network_received_bytes: int = 0
    gpus: tuple[GpuInfo, ...] = ()
    slots: int = 0
    free_slots: int = 0


class DatasetInfo(Shown):
    """A dataset a node can read."""

    name: str
    input_shape: tuple[int, ...]
    classes: int
    examples: int


class NodeInfo(Shown):
    """A node as discovery knows it; `lease_left_s` is negative once the lease has run out."""

    name: str
    role: Role
    region: str
    address: str
    health: Health
    activity: str
    version: str
    lease_left_s: float
    last_seen_at: datetime | None
    started_at: datetime | None
    resources: ResourceInfo
    datasets: tuple[DatasetInfo, ...] = ()


class RegionStatus(Shown):
    """The nodes of one region."""

    status: Overall
    live: int
    suspect: int
    expired: int
    nodes: tuple[NodeInfo, ...]


class NetworkStatus(Shown):
    """Health of the network; `reasons` say in words why it is degraded."""

    status: Overall
    reasons: tuple[str, ...]
    live: int
    suspect: int
    expired: int
    regions: Mapping[str, RegionStatus]


class Capacity(Shown):
    """What the live workers of a place have together; `cpu_utilisation` and `gpu_utilisation` are means, 0 to 1."""

    workers: int
    cpu_cores: int
    cpu_utilisation: float
    memory_bytes: int
    memory_available_bytes: int
    gpus: int
    gpu_memory_bytes: int
    gpu_memory_used_bytes: int
    gpu_utilisation: float
    slots: int
    free_slots: int
    datasets: tuple[str, ...]


class WorkerResources(Shown):
    """One live worker."""

    name: str
    activity: str
    resources: ResourceInfo
    datasets: tuple[str, ...]


class RegionResources(Capacity):
    """What a region has, and each of its live workers."""

    nodes: tuple[WorkerResources, ...]


class NetworkResources(Shown):
    """What can be had for training, by region and in total. Only live workers count."""

    total: Capacity
    regions: Mapping[str, RegionResources]


def network_status(nodes: Sequence[NodeInfo]) -> NetworkStatus:
    """The nodes by region, and whether all is well."""
    reasons = tuple(_complaints(nodes))
    counts = _counts(nodes)
    regions = {region: _region_status(members) for region, members in _by_region(nodes).items()}
    status = Overall.DEGRADED if reasons else Overall.OK
    return NetworkStatus(status=status, reasons=reasons, regions=regions, **counts)


def _region_status(members: Sequence[NodeInfo]) -> RegionStatus:
    counts = _counts(members)
    status = Overall.OK if counts["live"] == len(members) else Overall.DEGRADED
    return RegionStatus(status=status, nodes=tuple(members), **counts)


def _complaints(nodes: Sequence[NodeInfo]) -> Iterable[str]:
    live = {node.role for node in nodes if node.health is Health.LIVE}
    for role in _ESSENTIAL:
        if role not in live:
            yield f"no live {role.value}"
    for node in nodes:
        where = f"{node.role.value} {node.name} in {node.region}"
        if node.health is Health.SUSPECT:
            yield f"{where} misses heartbeats, its lease ends in {max(node.lease_left_s, 0.0):.0f} s"
        elif node.health is Health.EXPIRED:
            yield f"{where} is gone, its lease ended {-node.lease_left_s:.0f} s ago"


def _counts(nodes: Iterable[NodeInfo]) -> dict[str, int]:
    healths = [node.health for node in nodes]
    return {health.value: healths.count(health) for health in Health}


def _by_region(nodes: Iterable[NodeInfo]) -> dict[str, list[NodeInfo]]:
    regions: dict[str, list[NodeInfo]] = {}
    for node in sorted(nodes, key=lambda node: (node.region, node.role, node.name)):
        regions.setdefault(node.region, []).append(node)
    return regions


def network_resources(nodes: Iterable[NodeInfo]) -> NetworkResources:
    """What the live workers have, by region and in total."""
    workers = [node for node in nodes if node.role is Role.WORKER and node.health is Health.LIVE]
    regions = {
        region: RegionResources(**dict(_capacity(members)), nodes=tuple(_worker(member) for member in members))
        for region, members in _by_region(workers).items()
    }
    return NetworkResources(total=_capacity(workers), regions=regions)


def _worker(node: NodeInfo) -> WorkerResources:
    return WorkerResources(
        name=node.name, activity=node.activity, resources=node.resources, datasets=_dataset_names([node])
    )


def _capacity(workers: Sequence[NodeInfo]) -> Capacity:
    held = [worker.resources for worker in workers]
    gpus = [gpu for each in held for gpu in each.gpus]
    cores = sum(each.cpu_cores for each in held)
    busy_cores = sum(each.cpu_cores * each.cpu_utilisation for each in held)
    return Capacity(
        workers=len(workers),
        cpu_cores=cores,
        cpu_utilisation=busy_cores / cores if cores else 0.0,
        memory_bytes=sum(each.memory_bytes for each in held),
        memory_available_bytes=sum(each.memory_available_bytes for each in held),
        gpus=len(gpus),
        gpu_memory_bytes=sum(gpu.memory_bytes for gpu in gpus),
        gpu_memory_used_bytes=sum(gpu.memory_used_bytes for gpu in gpus),
        gpu_utilisation=sum(gpu.utilisation for gpu in gpus) / len(gpus) if gpus else 0.0,
        slots=sum(each.slots for each in held),
        free_slots=sum(each.free_slots for each in held),
        datasets=_dataset_names(workers),
    )


def _dataset_names(nodes: Iterable[NodeInfo]) -> tuple[str, ...]:
    return tuple(sorted({dataset.name for node in nodes for dataset in node.datasets}))
