"""What the network is said to be follows from its nodes."""

from __future__ import annotations

import pytest

from cortex_common.errors import CortexError
from cortex_common.identity import Role
from cortex_common.pb.v1 import common_pb2
from services.gateway.domain import (
    DatasetInfo,
    GpuInfo,
    Health,
    NodeInfo,
    Overall,
    ResourceInfo,
    network_resources,
    network_status,
)
from services.gateway.wire import node_from_proto

GPU = GpuInfo(name="G", memory_bytes=100, memory_used_bytes=40, utilisation=0.5)
IDLE = ResourceInfo(cpu_cores=4, cpu_utilisation=0.25, memory_bytes=10, memory_available_bytes=8, slots=2, free_slots=2)
BUSY = IDLE.model_copy(update={"cpu_cores": 12, "cpu_utilisation": 0.75, "free_slots": 0, "gpus": (GPU, GPU)})
DIGITS = DatasetInfo(name="digits", input_shape=(8, 8), classes=10, examples=1438)


def node(name: str, role: Role = Role.WORKER, region: str = "eu", **changes) -> NodeInfo:
    fields = {"address": "", "health": Health.LIVE, "activity": "", "version": "1", "lease_left_s": 9.0}
    fields |= {"last_seen_at": None, "started_at": None, "resources": IDLE, "datasets": (DIGITS,)}
    return NodeInfo(name=name, role=role, region=region, **(fields | changes))


CORE = (node("c", Role.COORDINATOR), node("a", Role.AGGREGATOR))


def test_a_complete_and_live_network_is_ok():
    status = network_status([*CORE, node("w1", region="us")])
    assert (status.status, status.reasons, status.live) == (Overall.OK, (), 3)
    assert {region: [each.name for each in found.nodes] for region, found in status.regions.items()} == {
        "eu": ["a", "c"],
        "us": ["w1"],
    }


def test_a_silent_node_degrades_its_region_and_the_network_with_a_reason():
    gone = node("w1", region="us", health=Health.EXPIRED, lease_left_s=-41.2)
    late = node("w2", health=Health.SUSPECT, lease_left_s=2.4)
    status = network_status([*CORE, gone, late, node("w3")])
    assert status.status is Overall.DEGRADED
    assert status.reasons == (
        "worker w1 in us is gone, its lease ended 41 s ago",
        "worker w2 in eu misses heartbeats, its lease ends in 2 s",
    )
    assert (status.live, status.suspect, status.expired) == (3, 1, 1)
    assert (status.regions["us"].status, status.regions["us"].expired) == (Overall.DEGRADED, 1)


def test_a_network_without_an_essential_service_is_degraded():
    status = network_status([node("w1")])
    assert status.reasons == ("no live coordinator", "no live aggregator")
    assert network_status([]).reasons[-1] == "no live worker"


def test_only_live_workers_count_as_resources():
    workers = [node("w1"), node("w2", region="us", resources=BUSY, datasets=()), node("w3", health=Health.SUSPECT)]
    found = network_resources([*CORE, *workers])
    total = found.total
    assert (total.workers, total.cpu_cores, total.cpu_utilisation) == (2, 16, (4 * 0.25 + 12 * 0.75) / 16)
    assert (total.gpus, total.gpu_memory_bytes, total.gpu_memory_used_bytes, total.gpu_utilisation) == (2, 200, 80, 0.5)
    assert (total.memory_bytes, total.memory_available_bytes) == (20, 16)
    assert (total.slots, total.free_slots, total.datasets) == (4, 2, ("digits",))
    assert [each.name for each in found.regions["us"].nodes] == ["w2"]
    assert (found.regions["us"].free_slots, found.regions["us"].datasets) == (0, ())


def test_an_empty_network_has_nothing():
    found = network_resources([])
    assert (found.total.workers, found.total.cpu_utilisation, found.regions) == (0, 0.0, {})


def test_a_node_is_shown_as_discovery_told_it():
    message = common_pb2.Node(
        name="w1",
        role=common_pb2.ROLE_WORKER,
        region="eu",
        health=common_pb2.NODE_HEALTH_SUSPECT,
        lease_left_s=1.23456,
        resources=common_pb2.Resources(cpu_cores=2, gpus=[common_pb2.Gpu(name="G", memory_bytes=100)]),
        datasets=[common_pb2.DatasetInfo(name="digits", input_shape=[8, 8], classes=10, examples=1438)],
    )
    message.last_seen_at.FromSeconds(1_700_000_000)
    shown = node_from_proto(message)
    assert (shown.role, shown.health, shown.lease_left_s) == (Role.WORKER, Health.SUSPECT, 1.235)
    assert (shown.datasets, shown.resources.gpus[0].memory_bytes) == ((DIGITS,), 100)
    assert shown.model_dump(mode="json")["last_seen_at"] == "2023-11-14T22:13:20Z"
    assert shown.started_at is None


def test_a_node_of_an_unknown_role_is_an_error_not_a_guess():
    with pytest.raises(CortexError, match="unknown role"):
        node_from_proto(common_pb2.Node(name="w1", role=77))
