"""Discovery as a whole, over real mutual TLS, with time in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from cortex_common.errors import AlreadyExistsError, ForbiddenError, InvalidArgumentError, PreconditionError
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.rpc.server import Running
from cortex_common.telemetry.metrics import REGISTRY
from services.discovery.main import run
from services.discovery.settings import DiscoverySettings
from tests.fakes import ManualClock

TlsOf = Callable[..., TlsFiles]
LIVE, SUSPECT, EXPIRED = (
    common_pb2.NODE_HEALTH_LIVE,
    common_pb2.NODE_HEALTH_SUSPECT,
    common_pb2.NODE_HEALTH_EXPIRED,
)


def worker(name: str = "w1", **changes) -> common_pb2.Node:
    fields = {"name": name, "role": common_pb2.ROLE_WORKER, "region": "eu", "incarnation": "first", "activity": "idle"}
    return common_pb2.Node(**(fields | changes))


class Network:
    """A discovery that can be stopped and started again, and callers of any role."""

    def __init__(self, tls_of: TlsOf, clock: ManualClock, state_dir: Path) -> None:
        self._tls_of = tls_of
        self._clock = clock
        self._state_dir = state_dir
        self.address = ""

    @asynccontextmanager
    async def discovery(self, **changes) -> AsyncIterator[Running]:
        tls = self._tls_of(Role.DISCOVERY)
        fields = {"name": "discovery-1", "state_dir": self._state_dir, "port": 0}
        files = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key}
        settings = DiscoverySettings(**(fields | files | changes))
        stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run(settings, self._clock, stop, started))
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        self.address = started.result().address
        try:
            yield started.result()
        finally:
            stop.set()
            await task

    @asynccontextmanager
    async def calling(self, role: Role, name: str = "") -> AsyncIterator[discovery_pb2_grpc.DiscoveryServiceAsyncStub]:
        async with open_channel(self.address, self._tls_of(role, name), Role.DISCOVERY) as channel:
            yield discovery_pb2_grpc.DiscoveryServiceStub(channel)

    async def beat(self, node: common_pb2.Node) -> discovery_pb2.HeartbeatResponse:
        role = Role[common_pb2.Role.Name(node.role).removeprefix("ROLE_")]
        async with self.calling(role, node.name) as stub:
            with calling("discovery"):
                return await stub.Heartbeat(discovery_pb2.HeartbeatRequest(node=node))

    async def nodes(self, **selection) -> dict[str, common_pb2.Node]:
        async with self.calling(Role.GATEWAY) as stub:
            response = await stub.ListNodes(discovery_pb2.ListNodesRequest(**selection))
        return {node.name: node for node in response.nodes}


@pytest.fixture
def network(tls_of: TlsOf, clock: ManualClock, tmp_path: Path) -> Network:
    return Network(tls_of, clock, tmp_path / "state")


async def test_a_heartbeat_makes_a_node_known_as_it_described_itself(network, clock):
    async with network.discovery():
        answer = await network.beat(worker(resources=common_pb2.Resources(slots=2, free_slots=1), version="1.2"))
        assert (answer.lease_s, answer.heartbeat_s) == (10.0, 3.0)
        node = (await network.nodes())["w1"]
        assert (node.health, node.region, node.version, node.activity) == (LIVE, "eu", "1.2", "idle")
        assert (node.resources.free_slots, node.lease_left_s) == (1, 10.0)
        assert node.last_seen_at.seconds == int(clock.wall_s())


async def test_discovery_lists_itself(network):
    async with network.discovery(region="hub") as running:
        while "discovery-1" not in (found := await network.nodes()):
            pass
        node = found["discovery-1"]
        assert (node.role, node.region, node.address) == (common_pb2.ROLE_DISCOVERY, "hub", running.address)
        assert node.resources.cpu_cores > 0


async def test_lists_are_selected_by_role_and_region(network):
    async with network.discovery():
        await network.beat(worker("w1"))
        await network.beat(worker("w2", region="us"))
        assert set(await network.nodes(role=common_pb2.ROLE_WORKER)) == {"w1", "w2"}
        assert set(await network.nodes(region="us")) == {"w2"}
        assert await network.nodes(role=common_pb2.ROLE_AGGREGATOR) == {}


async def test_silence_expires_and_a_late_heartbeat_revives(network, clock):
    async with network.discovery():
        await network.beat(worker())
        await clock.advance(7.0)
        assert (await network.nodes())["w1"].health == SUSPECT
        await clock.advance(4.0)
        node = (await network.nodes())["w1"]
        assert (node.health, node.lease_left_s) == (EXPIRED, -1.0)
        await network.beat(worker())
        assert (await network.nodes())["w1"].health == LIVE


async def test_expired_nodes_are_forgotten_in_the_end(network, clock):
    async with network.discovery(forget_s=60.0):
        await network.beat(worker())
        await clock.advance(69.0)
        assert (await network.nodes())["w1"].health == EXPIRED
        await clock.advance(2.0)
        assert "w1" not in await network.nodes()


async def test_a_goodbye_counts_at_once(network):
    async with network.discovery():
        await network.beat(worker())
        async with network.calling(Role.WORKER, "w1") as stub:
            goodbye = discovery_pb2.LeaveRequest(name="w1", incarnation="first")
            await stub.Leave(goodbye)
            await stub.Leave(goodbye)
        assert "w1" not in await network.nodes()


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        (worker("w2"), "worker 'w2' given; the caller's certificate says worker 'w1'"),
        (worker("w1", role=common_pb2.ROLE_COORDINATOR), "coordinator 'w1' given"),
    ],
)
async def test_nobody_can_announce_somebody_else(network, node, complaint):
    async with network.discovery(), network.calling(Role.WORKER, "w1") as stub:
        with pytest.raises(ForbiddenError, match=complaint), calling("discovery"):
            await stub.Heartbeat(discovery_pb2.HeartbeatRequest(node=node))
        with pytest.raises(ForbiddenError, match="leave"), calling("discovery"):
            await stub.Leave(discovery_pb2.LeaveRequest(name="w2"))


async def test_a_malformed_heartbeat_is_answered_with_every_mistake(network):
    async with network.discovery(), network.calling(Role.WORKER, "w1") as stub:
        node = common_pb2.Node(name="w1", role=common_pb2.ROLE_WORKER)
        with pytest.raises(InvalidArgumentError) as caught, calling("discovery"):
            await stub.Heartbeat(discovery_pb2.HeartbeatRequest(node=node))
        assert [violation.path for violation in caught.value.violations] == ["node.region", "node.incarnation"]


async def test_a_name_is_unique_in_the_network(network):
    async with network.discovery():
        await network.beat(worker("same"))
        with pytest.raises(AlreadyExistsError, match="in use by the worker"):
            await network.beat(worker("same", role=common_pb2.ROLE_AGGREGATOR))


async def test_workers_may_not_read_the_list(network):
    async with network.discovery(), network.calling(Role.WORKER, "w1") as stub:
        with pytest.raises(ForbiddenError), calling("discovery"):
            await stub.ListNodes(discovery_pb2.ListNodesRequest())


async def until(watch, condition) -> list[common_pb2.Node]:
    """Read a watch until the worker's part of the list fulfils a condition."""
    async with asyncio.timeout(10):
        while True:
            message = await watch.read()
            assert message is not grpc.aio.EOF
            nodes = [node for node in message.nodes if node.role == common_pb2.ROLE_WORKER]
            if condition(nodes):
                return nodes


async def test_a_watch_tells_of_joins_health_and_goodbyes(network, clock):
    async with network.discovery(), network.calling(Role.COORDINATOR) as stub:
        watch = stub.WatchNodes(discovery_pb2.WatchNodesRequest(refresh_s=3600.0))
        await until(watch, lambda nodes: nodes == [])
        await network.beat(worker("w1"))
        await until(watch, lambda nodes: [node.health for node in nodes] == [LIVE])
        await clock.advance(7.0)
        await until(watch, lambda nodes: [node.health for node in nodes] == [SUSPECT])
        await network.beat(worker("w2"))
        await until(watch, lambda nodes: [node.health for node in nodes] == [SUSPECT, LIVE])
        await clock.advance(4.0)
        await until(watch, lambda nodes: [node.health for node in nodes] == [EXPIRED, LIVE])
        async with network.calling(Role.WORKER, "w2") as leaving:
            await leaving.Leave(discovery_pb2.LeaveRequest(name="w2", incarnation="first"))
        await until(watch, lambda nodes: [node.name for node in nodes] == ["w1"])
        watch.cancel()


async def test_a_watch_repeats_the_list_when_nothing_changes(network, clock):
    async with network.discovery(), network.calling(Role.COORDINATOR) as stub:
        await network.beat(worker(activity="idle"))
        watch = stub.WatchNodes(discovery_pb2.WatchNodesRequest(role=common_pb2.ROLE_WORKER))
        await until(watch, lambda nodes: [node.activity for node in nodes] == ["idle"])
        await network.beat(worker(activity="training"))  # no change of membership or health
        pending = asyncio.create_task(until(watch, lambda nodes: [node.activity for node in nodes] == ["training"]))
        while not pending.done():
            await clock.advance(1.0)
            await network.beat(worker(activity="training"))
        await pending
        watch.cancel()


async def test_a_watch_that_would_never_rest_is_refused(network):
    async with network.discovery(), network.calling(Role.COORDINATOR) as stub:
        watch = stub.WatchNodes(discovery_pb2.WatchNodesRequest(refresh_s=0.001))
        with pytest.raises(InvalidArgumentError, match="allowed"), calling("discovery"):
            await watch.read()


async def test_watches_end_when_discovery_stops(network):
    async with network.discovery():
        channel = network.calling(Role.COORDINATOR)
        stub = await channel.__aenter__()
        watch = stub.WatchNodes(discovery_pb2.WatchNodesRequest())
        await watch.read()
    async with asyncio.timeout(10):
        while await watch.read() is not grpc.aio.EOF:
            pass
    await channel.__aexit__(None, None, None)


async def test_after_a_restart_the_network_is_remembered_for_one_lease(network, clock):
    async with network.discovery():
        await network.beat(worker("w1"))
        await network.beat(worker("w2"))
    clock.jump_wall(120.0)
    async with network.discovery():
        assert {name: node.health for name, node in (await network.nodes(region="eu")).items()} == {
            "w1": LIVE,
            "w2": LIVE,
        }
        await clock.advance(5.0)
        await network.beat(worker("w2"))
        await clock.advance(5.5)
        healths = {name: node.health for name, node in (await network.nodes(region="eu")).items()}
        assert healths == {"w1": EXPIRED, "w2": LIVE}


async def test_a_damaged_snapshot_costs_only_the_memory(network, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "nodes.json").write_text('{"nodes": [')
    async with network.discovery():
        await network.beat(worker())
        assert (await network.nodes())["w1"].health == LIVE


async def test_the_snapshot_is_written_at_a_change(network, tmp_path):
    async with network.discovery():
        await network.beat(worker("w-seen"))
        async with asyncio.timeout(10):
            while "w-seen" not in (tmp_path / "state" / "nodes.json").read_text():
                await network.nodes()


async def test_nodes_and_heartbeats_are_counted(network):
    before = REGISTRY.get_sample_value("cortex_discovery_heartbeats_total", {"role": "worker"}) or 0.0
    async with network.discovery():
        await network.beat(worker(region="eu-metrics"))
        labels = {"role": "worker", "region": "eu-metrics", "health": "live"}
        assert REGISTRY.get_sample_value("cortex_discovery_nodes", labels) == 1.0
        assert REGISTRY.get_sample_value("cortex_discovery_heartbeats_total", {"role": "worker"}) == before + 1


async def test_settings_that_do_not_fit_are_refused_at_the_start(network):
    with pytest.raises(InvalidArgumentError, match="lease_s"):
        async with network.discovery(lease_s=3.0):
            pass
    with pytest.raises(PreconditionError, match="certificate"):
        async with network.discovery(name="somebody-else"):
            pass
