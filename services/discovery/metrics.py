"""What discovery counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cortex_common.telemetry.metrics import counter, gauge
from services.discovery.domain import View

NODES = gauge("cortex_discovery_nodes", "Nodes known, by what their lease says.", ("role", "region", "health"))
HEARTBEATS = counter("cortex_discovery_heartbeats_total", "Heartbeats taken.", ("role",))
CHANGES = counter("cortex_discovery_changes_total", "Changes of membership or health.", ("event",))
WATCHERS = gauge("cortex_discovery_watchers", "Streams of people and services that watch the nodes.")
SNAPSHOT_FAILURES = counter("cortex_discovery_snapshot_failures_total", "Snapshots that could not be written.")
CERTIFICATES = counter("cortex_discovery_certificates_total", "Certificates made.", ("role", "why"))
ROTATIONS = counter("cortex_discovery_authority_rotations_total", "New authorities.", ("kind",))
for _kind in ("root", "issuing"):
    ROTATIONS.labels(_kind)
DENIALS = gauge("cortex_discovery_denials", "Identities shut out, entirely or in part.")
PASSES = counter("cortex_discovery_node_passes_total", "Passes given to gateways, for nodes that proved their token.")


def measure_nodes(views: Iterable[View]) -> None:
    """Publish how many nodes there are; combinations that are gone are gone from the metric."""
    counts = Counter((view.node.role.value, view.node.region, view.health.value) for view in views)
    NODES.clear()
    for labels, number in counts.items():
        NODES.labels(*labels).set(number)
