"""Nodes as discovery describes them, read by the coordinator."""

from __future__ import annotations

from cortex_common.identity import Role
from cortex_common.pb.v1 import common_pb2
from services.coordinator.wire import role_of


def test_a_role_of_a_newer_version_is_none_that_is_known() -> None:
    assert role_of(common_pb2.Node(role=common_pb2.ROLE_WORKER)) is Role.WORKER
    assert role_of(common_pb2.Node()) is None
    assert role_of(common_pb2.Node(role=99)) is None  # type: ignore[arg-type]
