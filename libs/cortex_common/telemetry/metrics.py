"""Prometheus metrics of this process.

Names are `cortex_<service>_<noun>_<unit>`; labels have few values and are never ids.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)

DISTRIBUTION = "cortex-training"
# From a local call to the upload of a big model.
SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

REGISTRY = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_made: dict[str, MetricWrapperBase] = {}


def counter(name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
    """The counter of that name in this process, made at the first call."""
    return _once(name, Counter, lambda: Counter(name, documentation, labels, registry=REGISTRY))


def gauge(name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
    """The gauge of that name in this process, made at the first call."""
    return _once(name, Gauge, lambda: Gauge(name, documentation, labels, registry=REGISTRY))


def histogram(
    name: str, documentation: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS_BUCKETS
) -> Histogram:
    """The histogram of that name in this process, made at the first call."""
    return _once(name, Histogram, lambda: Histogram(name, documentation, labels, buckets=buckets, registry=REGISTRY))


def cortex_version() -> str:
    """Version of the installed distribution; "unknown" in a bare checkout."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def publish_build_info(service: str) -> None:
    """Set `cortex_build_info` with the version of Cortex and Python."""
    made = _once("cortex_build", Info, lambda: Info("cortex_build", "What runs here.", registry=REGISTRY))
    made.info({"service": service, "version": cortex_version(), "python": platform.python_version()})


def _once(name: str, kind: type[_Metric], make: Callable[[], _Metric]) -> _Metric:
    metric = _made.get(name)
    if metric is None:
        metric = _made[name] = make()
    if not isinstance(metric, kind):
        raise TypeError(f"metric {name} is a {type(metric).__name__}, not a {kind.__name__}")
    return metric
