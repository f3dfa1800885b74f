"""Who is let in at the gateway, who is not, and why."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from websockets.exceptions import InvalidStatus

from cortex_common.clock import SystemClock
from cortex_common.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Role
from cortex_common.network import messages as m
from cortex_common.network.bridge import ReconnectPolicy, TenzroBridge
from cortex_common.network.protocol import Envelope, TenzroProtocol
from cortex_common.network.websocket_link import open_link
from cortex_common.network.websocket_transport import WebSocketTransport
from cortex_common.network.work import Place
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.security.node_tokens import NodeToken
from cortex_common.telemetry.hardware import Resources
from tests.integration.websocket.conftest import KEY, PRIVATE, Gate, assignment, gate_of
from tests.integration.worker.gateways import node_network
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_node_joins_and_gets_its_work(gate: Gate) -> None:
    async with gate.raw() as raw:
        welcome = await raw.join(await gate.access("ws1"))
        assert isinstance(welcome, m.Welcome)
        assert (welcome.version, welcome.network, welcome.node) == (1, "cortex", "ws1")
        assert welcome.window >= 2
        line = await raw.expect(m.Assignments)
        assert line == m.Assignments((), (), is_first=True)


async def test_a_token_that_is_not_good_is_refused_with_the_reason(gate: Gate) -> None:
    real = await gate.token("ws1")
    for token, kind, reason in (
        (NodeToken.fresh(), UnauthenticatedError, "not known here"),
        (NodeToken(real.token_id, NodeToken.fresh().secret), UnauthenticatedError, "proof is wrong"),
        (await gate.token("ws2"), ForbiddenError, "is for 'ws2'"),
    ):
        with pytest.raises(kind, match=reason):
            await open_link(await gate.access("ws1", token=token), attends=True)
    for changes, code, reason in (
        ({"version": 99}, 4426, "version 99 given; allowed: 1"),
        ({"challenge": "ab" * 32}, 4401, "another challenge"),
        ({"sealing_key": "ab" * 32}, 4401, "proof is wrong"),
        ({"token_id": "ab" * 6}, 4401, "not known here"),
    ):
        async with gate.raw() as raw:
            error = await raw.join(await gate.access("ws1"), **changes)
            assert isinstance(error, m.ErrorMessage)
            assert reason in error.message
            closed, told = await raw.closed()
            assert (closed, told) == (code, error.message[:123])


async def test_an_expired_token_is_refused_by_that_reason(gate: Gate) -> None:
    token = await gate.nodes.token("ws3", life_s=0.3)
    ends_s = SystemClock().wall_s() + 0.3
    await eventually(lambda: SystemClock().wall_s() >= ends_s)
    with pytest.raises(UnauthenticatedError, match="expired: ask the operator"):
        await open_link(await gate.access("ws3", token=token), attends=True)


async def test_who_does_not_join_in_time_is_closed(tls_of, tmp_path) -> None:
    async with node_network(tls_of, tmp_path) as nodes, gate_of(nodes, node_join_s=0.2) as gate, gate.raw() as raw:
        assert await raw.closed() == (4408, "no JOIN within 0.2 s")


async def test_the_newest_connection_of_a_node_attends(gate: Gate) -> None:
    async with gate.raw("ws1") as first, gate.raw("ws1") as second:
        closed, told = await first.closed()
        assert (closed, told) == (4409, "a newer connection of node 'ws1' took this one's place")
        async with gate.raw("ws1", attends=False):
            await second.send(m.TrainingMetrics(_place(), "training"))
            assert (await second.expect(m.ReportAck)).wanted


async def test_heartbeats_and_leave_reach_discovery(gate: Gate) -> None:
    async with gate.raw("ws4") as raw:
        resources = Resources(4, 0.5, 8 << 30, 4 << 30, 1 << 30, 0, 0, slots=1, free_slots=1)
        await raw.send(m.Heartbeat(resources, activity="idle"))
        assert (await raw.expect(m.HeartbeatAck)).heartbeat_s == 3.0
        assert "ws4" in await _known(gate)
        await raw.send(m.Leave())
        assert (await raw.closed())[0] == 1000
        assert "ws4" not in await _known(gate)


async def test_a_node_is_told_of_its_jobs_and_of_no_others(gate: Gate) -> None:
    gate.jobs.watched, gate.jobs.endless = [gate.jobs.status], True
    async with gate.raw("ws6") as raw:
        await raw.send(m.JobStatusRequest("job-1"))
        refused = await raw.expect(m.ErrorMessage)
        because = "node 'ws6' has no assignment of job 'job-1' here yet; retry"
        assert (refused.code, refused.message) == ("UNAVAILABLE", because)
        await gate.coordinator.assign("ws6", assignment())
        (work,) = (await raw.expect(m.Assignments)).assignments
        assert (work.job_id, work.seat, work.aggregator_address) == ("job-1", 0, "127.0.0.1:9")
        told = await raw.expect(m.JobStatusMessage)
        assert (told.job.status, told.job.metrics["test_accuracy"]) == ("training", 0.842)
        asked = await raw.send(m.JobStatusRequest("job-1"))
        answer = await raw.receive()
        assert (answer.ref, answer.message) == (asked, told)


async def test_job_keys_pass_through_the_gateway_wrapped(gate: Gate) -> None:
    async with gate.raw("ws7") as raw:
        await gate.coordinator.assign("ws7", assignment())
        (work,) = (await raw.expect(m.Assignments)).assignments
        text = TenzroProtocol.encode(Envelope(m.Assignments((work,))))
        assert work.data_key.wrapped.hex() in text
        assert KEY.key.hex() not in text
        assert PRIVATE.unwrap(work.job_id, work.data_key) == KEY


async def test_a_revoked_node_is_cut_off_and_refused(gate: Gate) -> None:
    access = await gate.access("ws5")
    bridge = TenzroBridge(
        WebSocketTransport(access), SystemClock(), ReconnectPolicy(fatal=(UnauthenticatedError,), first_wait_s=0.01)
    )
    line = asyncio.create_task(bridge.run())
    await bridge.opened()
    await gate.nodes.revoke("ws5")
    with pytest.raises(UnauthenticatedError, match="revoked"):
        async with asyncio.timeout(10):
            await line


async def test_admission_is_renewed_and_the_line_goes_on(tls_of, tmp_path) -> None:
    async with node_network(tls_of, tmp_path, pass_life_s=1.0) as nodes, gate_of(nodes) as gate:
        bridge = TenzroBridge(WebSocketTransport(await gate.access("ws1")), SystemClock())
        heard: list[m.Assignments] = []
        bridge.on(m.Assignments, heard.append)
        line = asyncio.create_task(bridge.run())
        await eventually(lambda: gate.coordinator.attended >= 4)
        await gate.coordinator.assign("ws1")
        assert await bridge.report(m.TrainingMetrics(_place(), "training"), is_urgent=True)
        assert [each.is_first for each in heard].count(True) == 1
        assert not line.done()
        line.cancel()
        await bridge.close()


async def test_who_does_not_answer_the_next_challenge_is_closed(tls_of, tmp_path) -> None:
    async with (
        node_network(tls_of, tmp_path, pass_life_s=1.0) as nodes,
        gate_of(nodes, node_join_s=0.2) as gate,
        gate.raw("ws1") as raw,
    ):
        await raw.expect(m.Challenge)
        code, reason = await raw.closed()
        assert (code, reason) == (4408, "the CHALLENGE was not answered within 0.25 s")


async def test_more_nodes_than_there_is_room_for_are_refused_until_one_leaves(tls_of, tmp_path) -> None:
    async with (
        node_network(tls_of, tmp_path) as nodes,
        gate_of(nodes, max_node_connections=2) as gate,
        gate.raw("ws1"),
        gate.raw("ws2") as leaving,
    ):
        with pytest.raises(InvalidStatus) as refused:
            await gate.raw().__aenter__()
        assert (refused.value.response.status_code, refused.value.response.body) == (
            503,
            b"no room for another node now\n",
        )
        await leaving.connection.close()
        async with gate.raw("ws3"):
            pass


async def test_a_gateway_that_is_shut_out_does_not_blame_the_nodes_tokens(tls_of, tmp_path) -> None:
    """Programs give up when their token is not good; here another gateway, or this one let in again, will do."""
    async with node_network(tls_of, tmp_path) as nodes, gate_of(nodes) as gate, gate.raw("ws1") as raw:
        known = tmp_path / "discovery" / "nodes.json"
        await eventually(lambda: known.exists() and "gateway-1" in known.read_text(), 30)
        await gate.nodes.revoke("gateway-1")
        await raw.send(m.Heartbeat(Resources(1, 0.0, 1, 1, 1, 0, 0)))
        code, _ = await raw.closed()
        assert code == 1013
        with pytest.raises(UnavailableError, match="refuses this gateway"):
            await open_link(await gate.access("ws1"), attends=True)


async def test_one_node_cannot_take_every_place(tls_of, tmp_path) -> None:
    async with (
        node_network(tls_of, tmp_path) as nodes,
        gate_of(nodes, max_node_connections=8) as gate,
        AsyncExitStack() as opened,
        gate.raw("ws1") as attending,
    ):
        others = [await opened.enter_async_context(gate.raw("ws1", attends=False)) for _ in range(9)]
        for each in others[:4]:
            assert await each.closed() == (1013, "node 'ws1' has more than 6 connections: the oldest goes")
        async with gate.raw("ws2") as another:
            await another.expect(m.Assignments)
        await attending.send(m.TrainingMetrics(_place(), "training"))
        assert (await attending.expect(m.ReportAck)).wanted
        for each in others[4:]:
            await each.send(m.TrainingMetrics(_place(), "training"))
            assert (await each.expect(m.ReportAck)).wanted


async def test_a_gateway_that_stops_says_so(tls_of, tmp_path) -> None:
    async with node_network(tls_of, tmp_path) as nodes:
        async with gate_of(nodes) as gate:
            entered = gate.raw("ws1")
            raw = await entered.__aenter__()
        assert await raw.closed() == (1001, "the gateway stops")
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await open_link(await gate.access("ws1"), attends=True)


def _place() -> Place:
    return Place("a1", "job-1", 1, 0)


async def _known(gate: Gate) -> set[str]:
    tls = gate.nodes.tls_of(Role.OPERATOR, "ann")
    async with open_channel(gate.nodes.discovery, tls, Role.DISCOVERY) as channel:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        return {node.name for node in (await stub.ListNodes(discovery_pb2.ListNodesRequest())).nodes}


async def test_a_gateway_that_was_started_again_tells_of_jobs_that_have_ended(tls_of, tmp_path) -> None:
    kept = {"state_dir": tmp_path / "kept"}
    async with node_network(tls_of, tmp_path) as nodes:
        async with gate_of(nodes, **kept) as gate:
            await gate.introduce("ws8", "127.0.0.1:9")
            await eventually(lambda: (tmp_path / "kept" / "addresses.json").exists())
            tokens = gate.tokens
        async with gate_of(nodes, **kept) as gate:
            gate.tokens = tokens
            async with gate.raw("ws8", attends=False) as raw:
                await raw.send(m.JobStatusRequest("job-1"))
                assert isinstance((await raw.receive()).message, m.JobStatusMessage)
