"""Heartbeats are checked as a whole, and come back as they were said."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.identity import Role
from cortex_common.pb.v1 import common_pb2
from services.discovery.domain import Health, View
from services.discovery.wire import announcement_from_proto, node_to_proto, role_from_proto


def node(**changes) -> common_pb2.Node:
    fields = {"name": "w1", "role": common_pb2.ROLE_WORKER, "region": "eu", "incarnation": "i", "activity": "idle"}
    return common_pb2.Node(**(fields | changes))


def test_a_node_is_told_in_its_own_words_with_discoverys_verdict():
    said = node(
        resources=common_pb2.Resources(cpu_cores=4, gpus=[common_pb2.Gpu(name="G")]),
        datasets=[common_pb2.DatasetInfo(name="digits", input_shape=[8, 8])],
        health=common_pb2.NODE_HEALTH_LIVE,
        lease_left_s=1e9,
    )
    told = node_to_proto(View(announcement_from_proto(said), Health.SUSPECT, 2.5, 1_700_000_000.5))
    assert (told.health, told.lease_left_s) == (common_pb2.NODE_HEALTH_SUSPECT, 2.5)
    assert told.last_seen_at.ToNanoseconds() == 1_700_000_000_500_000_000
    told.ClearField("last_seen_at")
    told.health, told.lease_left_s = said.health, said.lease_left_s
    assert told == said


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InvalidArgumentError) as caught:
        announcement_from_proto(common_pb2.Node(role=99, region="eu west", activity="x" * 513))
    paths = [violation.path for violation in caught.value.violations]
    assert paths == ["node.activity", "node.name", "node.role", "node.region", "node.incarnation"]


@pytest.mark.parametrize(
    "changes",
    [
        {"region": ""},
        {"region": "x" * 64},
        {"region": "eu\n"},
        {"datasets": [common_pb2.DatasetInfo()] * 1001},
        {"resources": common_pb2.Resources(gpus=[common_pb2.Gpu()] * 65)},
        {"role": common_pb2.ROLE_UNSPECIFIED},
    ],
)
def test_what_a_node_may_say_has_limits(changes):
    with pytest.raises(InvalidArgumentError, match="allowed"):
        announcement_from_proto(node(**changes))


def test_every_role_has_its_number_and_unspecified_means_all():
    roles = {role_from_proto(number) for number in common_pb2.Role.values()}
    assert roles == {None, *Role}
    with pytest.raises(InvalidArgumentError, match="77 given"):
        role_from_proto(77)
