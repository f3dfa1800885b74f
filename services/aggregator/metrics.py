"""What an aggregator counts."""

from __future__ import annotations

from cortex_common.security.objects import ObjectHeader
from cortex_common.telemetry.metrics import counter, gauge, histogram

UPDATES = counter(
    "cortex_aggregator_updates_total",
    "Uploads that ended, by how: accepted, repeated, or the error's class.",
    ("outcome",),
)
# A counter that is first seen at 1 has not increased: alerts need the zero.
for _outcome in ("accepted", "overloaded", "corrupt"):
    UPDATES.labels(_outcome)
BYTES_UP = counter("cortex_aggregator_received_bytes_total", "Sealed bytes of updates taken into the spool.")
ACCEPTED_BYTES = counter("cortex_aggregator_accepted_bytes_total", "Sealed bytes of accepted updates.", ("codec",))
ACCEPTED_PARAMETERS = counter(
    "cortex_aggregator_accepted_parameters_total", "Parameters of accepted updates.", ("codec",)
)
BYTES_DOWN = counter("cortex_aggregator_sent_bytes_total", "Sealed bytes of model versions sent.")
BYTES_RELAYED = counter("cortex_aggregator_relayed_bytes_total", "Sealed bytes of versions fetched from one tier up.")
FOLD_SECONDS = histogram("cortex_aggregator_fold_seconds", "Time to fold a round into the next version.")
SPOOL_BYTES = gauge("cortex_aggregator_spool_bytes", "Bytes of updates in the spool.")
OPEN_ROUNDS = gauge("cortex_aggregator_open_rounds", "Rounds that take updates.")
VERSIONS = gauge("cortex_aggregator_versions", "Model versions held.")


def count_accepted(header: ObjectHeader, size_bytes: int) -> None:
    """Count an update that is durable now; bytes by parameters is what its codec really costs."""
    UPDATES.labels("accepted").inc()
    ACCEPTED_BYTES.labels(header.codec).inc(size_bytes)
    ACCEPTED_PARAMETERS.labels(header.codec).inc(header.elements)
