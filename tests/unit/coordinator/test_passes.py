"""What a gateway may say of a node at the coordinator."""

from __future__ import annotations

import pytest

from cortex_common.errors import ForbiddenError
from cortex_common.identity import Identity, Role
from cortex_common.ids import NodeName
from cortex_common.pb.v1.coordinator_pb2 import AttendRequest
from cortex_common.rpc.passing import acting_by
from cortex_common.security.passes import NodePass
from services.coordinator.servicer import _check_pass

NODE, GATEWAY = Identity("cortex", Role.WORKER, NodeName("ws1")), Identity("cortex", Role.GATEWAY, NodeName("g1"))
PASS = NodePass(NODE, "eu", GATEWAY, "ab" * 32, "cd" * 6, 0.0, 300.0)


def attend(sealing_key: str = "ab" * 32, region: str = "eu") -> None:
    _check_pass(AttendRequest(worker="ws1", region=region, sealing_key=bytes.fromhex(sealing_key)))


def test_a_gateway_cannot_have_a_nodes_keys_wrapped_to_another_key_or_move_it() -> None:
    with acting_by(PASS):
        attend()
        with pytest.raises(ForbiddenError, match="sealing_key 'ee"):
            attend(sealing_key="ee" * 32)
        with pytest.raises(ForbiddenError, match="region 'us' given; node 'ws1' proved 'eu'"):
            attend(region="us")


def test_who_speaks_for_itself_says_its_own() -> None:
    attend(sealing_key="ee" * 32, region="us")
