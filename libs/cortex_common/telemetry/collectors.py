"""Gauges measured when Prometheus asks: the machine, and how long the certificate still holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CortexError
from cortex_common.identity import TlsFiles
from cortex_common.security.certificates import certificate_of
from cortex_common.telemetry.metrics import REGISTRY
from cortex_common.telemetry.resources import Gpu, probe_resources

_GAUGES = (
    ("cpu_cores", "cortex_node_cpu_cores", "Cores this process may use."),
    ("cpu_utilisation", "cortex_node_cpu_utilisation_ratio", "Share of all cores in use, 0 to 1."),
    ("memory_bytes", "cortex_node_memory_bytes", "Memory in all."),
    ("memory_available_bytes", "cortex_node_memory_available_bytes", "Memory that can still be had."),
    ("disk_free_bytes", "cortex_node_disk_free_bytes", "Free space where the state is kept."),
)
_COUNTERS = (
    ("network_sent_bytes", "cortex_node_network_sent_bytes", "Bytes sent by the machine."),
    ("network_received_bytes", "cortex_node_network_received_bytes", "Bytes received by the machine."),
)
_GPU_GAUGES = (
    ("utilisation", "cortex_node_gpu_utilisation_ratio", "Share of the GPU in use, 0 to 1."),
    ("memory_bytes", "cortex_node_gpu_memory_bytes", "Memory of the GPU."),
    ("memory_used_bytes", "cortex_node_gpu_memory_used_bytes", "Memory in use on the GPU."),
)


class NodeCollector(Collector):
    """The machine's resources and the certificate's remaining life."""

    def __init__(self, tls: TlsFiles | None, disk: Path | None, clock: Clock) -> None:
        self._tls = tls
        self._disk = disk
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: registering must not probe."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Probe now."""
        resources = probe_resources(self._disk)
        for field, name, documentation in _GAUGES:
            yield GaugeMetricFamily(name, documentation, value=getattr(resources, field))
        for field, name, documentation in _COUNTERS:
            yield CounterMetricFamily(name, documentation, value=getattr(resources, field))
        yield from _gpu_metrics(resources.gpus)
        if self._tls is not None:
            yield from self._certificate(self._tls)

    def _certificate(self, tls: TlsFiles) -> Iterator[Metric]:
        try:
            left_s = certificate_of(tls).seconds_left(self._clock.wall_s())
        except CortexError:
            left_s = 0.0  # a certificate that cannot be read is as good as expired
        yield GaugeMetricFamily("cortex_certificate_expires_seconds", "Time until it expires.", value=left_s)


def _gpu_metrics(gpus: tuple[Gpu, ...]) -> Iterator[Metric]:
    if not gpus:
        return
    for field, name, documentation in _GPU_GAUGES:
        family = GaugeMetricFamily(name, documentation, labels=("gpu",))
        for index, gpu in enumerate(gpus):
            family.add_metric((str(index),), getattr(gpu, field))
        yield family


_published: dict[CollectorRegistry, NodeCollector] = {}


def publish_node(
    tls: TlsFiles | None = None,
    disk: Path | None = None,
    clock: Clock | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> None:
    """Have the machine and the certificate in this process's metrics; a second call replaces the first."""
    before = _published.pop(registry, None)
    if before is not None:
        registry.unregister(before)
    collector = _published[registry] = NodeCollector(tls, disk, clock or SystemClock())
    registry.register(collector)
