"""What the command shows of nodes when discovery is of a newer version."""

from __future__ import annotations

from cortex.wire import node_from_proto
from cortex_common.pb.v1 import common_pb2


def test_what_only_a_newer_version_has_a_name_for_is_shown_as_unknown() -> None:
    node = common_pb2.Node(name="n1", role=99, health=common_pb2.NODE_HEALTH_LIVE)  # type: ignore[arg-type]
    node.last_seen_at.seconds = 1 << 60
    shown = node_from_proto(node)
    assert (shown.role, shown.health, shown.last_seen_at) == ("unknown", "live", None)
