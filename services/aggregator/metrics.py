"""What an aggregator counts."""

from __future__ import annotations

from cortex_common.telemetry.metrics import counter, gauge, histogram

UPDATES = counter(
    "cortex_aggregator_updates_total",
    "Uploads that ended, by how: accepted, repeated, or the error's class.",
    ("outcome",),
)
BYTES_UP = counter("cortex_aggregator_received_bytes_total", "Sealed bytes of updates taken into the spool.")
BYTES_DOWN = counter("cortex_aggregator_sent_bytes_total", "Sealed bytes of model versions sent.")
BYTES_RELAYED = counter("cortex_aggregator_relayed_bytes_total", "Sealed bytes of versions fetched from one tier up.")
FOLD_SECONDS = histogram("cortex_aggregator_fold_seconds", "Time to fold a round into the next version.")
SPOOL_BYTES = gauge("cortex_aggregator_spool_bytes", "Bytes of updates in the spool.")
OPEN_ROUNDS = gauge("cortex_aggregator_open_rounds", "Rounds that take updates.")
VERSIONS = gauge("cortex_aggregator_versions", "Model versions held.")
