"""An aggregator is shut out: the gateway breaks off what it passes on for a node, and passes nothing more on."""

from __future__ import annotations

from pathlib import Path

from cortex_common.identity import Role
from cortex_common.network import messages as m
from cortex_common.network.protocol import TenzroProtocol
from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import open_channel
from tests.integration.websocket.conftest import Gate, Raw, TlsOf, gate_of
from tests.integration.websocket.test_slow_nodes import SHA256, endless, stalled
from tests.integration.worker.gateways import node_network
from tests.waiting import eventually


async def test_a_version_on_its_way_is_cut_off_and_the_next_one_refused(tls_of: TlsOf, tmp_path: Path) -> None:
    async with node_network(tls_of, tmp_path) as nodes, gate_of(nodes) as gate, endless(tls_of) as weights:
        await gate.introduce("ws1", weights.address)
        async with gate.raw("ws1") as raw:
            await stalled(raw)
            assert weights.open == 1
            await make_known(gate, "aggregator-1")
            await gate.nodes.revoke("aggregator-1")
            assert await refusal(raw) == "downloading a model of job job-1: the call was cut off"
            await eventually(lambda: weights.open == 0, 30)
            await raw.send(m.ModelPull("job-1", SHA256))
            assert "aggregator aggregator-1 was revoked (lost)" in await refusal(raw)


async def make_known(gate: Gate, aggregator: str) -> None:
    """Nobody is shut out whom discovery does not know."""
    tls = gate.nodes.tls_of(Role.AGGREGATOR, aggregator)
    async with open_channel(gate.nodes.discovery, tls, Role.DISCOVERY) as channel:
        node = common_pb2.Node(
            name=aggregator, role=common_pb2.ROLE_AGGREGATOR, region="eu", address="127.0.0.1:9", incarnation="1"
        )
        await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(discovery_pb2.HeartbeatRequest(node=node))


async def refusal(raw: Raw) -> str:
    """The next error, past all frames before it; another attempt may help."""
    while True:
        data = await raw.connection.recv()
        if isinstance(data, str):
            message = TenzroProtocol.decode(data).message
            if isinstance(message, m.ErrorMessage):
                assert message.code == "UNAVAILABLE"
                return message.message
