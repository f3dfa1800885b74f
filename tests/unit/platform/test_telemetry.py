"""Metrics and resources."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cortex_common.clock import SystemClock
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of
from cortex_common.telemetry.collectors import publish_node
from cortex_common.telemetry.metrics import REGISTRY, counter, gauge, publish_build_info
from cortex_common.telemetry.resources import Gpu, Resources, probe_resources
from cortex_common.telemetry.wire import resources_from_proto, resources_to_proto
from tests.conftest import HOSTS
from tests.fakes import ManualClock


def test_a_machine_without_gpu_is_measured(tmp_path: Path) -> None:
    resources = probe_resources(tmp_path / "not" / "there", slots=2, free_slots=1)
    assert resources.cpu_cores >= 1
    assert 0 <= resources.cpu_utilisation <= 1
    assert 0 < resources.memory_available_bytes <= resources.memory_bytes
    assert resources.disk_free_bytes > 0
    assert (resources.slots, resources.free_slots) == (2, 1)


def test_a_busy_machine_shows_in_the_next_probes() -> None:
    while probe_resources().cpu_utilisation == 0:
        sum(range(100_000))
    assert probe_resources().cpu_utilisation <= 1


def test_resources_survive_the_wire() -> None:
    resources = Resources(8, 0.25, 10, 9, 8, 7, 6, (Gpu("a", 3, 2, 0.5), Gpu("b", 4, 1, 0.0)), 2, 1)
    assert resources_from_proto(resources_to_proto(resources)) == resources


def test_a_metric_is_made_once() -> None:
    assert counter("cortex_test_things_total", "Things.") is counter("cortex_test_things_total", "Things.")
    with pytest.raises(TypeError, match="is a Counter"):
        gauge("cortex_test_things_total", "Things.")


def published(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if not line.startswith("#")}


def test_the_node_and_its_certificate_are_published(authority: Authority, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    tls = authority.issue(Identity("cortex", Role.WORKER, NodeName("w1")), HOSTS, tmp_path)
    for _ in range(2):
        publish_node(tls, tmp_path, SystemClock(), registry)
    samples = published(registry)
    assert samples["cortex_certificate_expires_seconds"] == pytest.approx(24 * 3600, abs=60)
    assert samples["cortex_node_memory_bytes"] > 0
    assert samples["cortex_node_network_sent_bytes_total"] >= 0


def test_how_long_the_certificate_holds_is_told_to_the_moment(authority: Authority, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    tls = authority.issue(Identity("cortex", Role.WORKER, NodeName("w1")), HOSTS, tmp_path)
    ends_s = certificate_of(tls).not_after.timestamp()
    for left_s in (43200.5, 0.25, -1.0):
        publish_node(tls, tmp_path, ManualClock(wall_s=ends_s - left_s), registry)
        assert published(registry)["cortex_certificate_expires_seconds"] == pytest.approx(left_s, abs=1e-3)


def test_a_certificate_that_cannot_be_read_counts_as_expired(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    publish_node(TlsFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c"), tmp_path, None, registry)
    assert b"cortex_certificate_expires_seconds 0.0" in generate_latest(registry)


def test_the_build_is_published() -> None:
    publish_build_info("example")
    assert b'cortex_build_info{python="3.' in generate_latest(REGISTRY)
