"""What a server does with calls it lets in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cortex_common.errors import (
    AlreadyExistsError,
    CortexError,
    InvalidArgumentError,
    OverloadedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2, aggregator_pb2_grpc, common_pb2, discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.rpc.identity import current_identity
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.telemetry.metrics import REGISTRY
from tests.fakes import settle
from tests.integration.platform.conftest import MISTAKES, Served, ServeExample
from tests.waiting import eventually

TlsOf = Callable[[Role, str], TlsFiles]
DISCOVERY = "cortex.v1.DiscoveryService"


@pytest.fixture
async def worker(served: Served, tls_of: TlsOf) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel:
        yield channel


@pytest.fixture
async def gateway(served: Served, tls_of: TlsOf) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(served.address, tls_of(Role.GATEWAY, "g1"), Role.DISCOVERY) as channel:
        yield channel


async def heartbeat(channel: grpc.aio.Channel, region: str = "") -> None:
    request = discovery_pb2.HeartbeatRequest(node=common_pb2.Node(region=region))
    with calling("discovery at d:1"):
        await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(request)


def counted(method: str, code: str, service: str = DISCOVERY) -> float:
    labels = {"service": service, "method": method, "code": code}
    return REGISTRY.get_sample_value("cortex_rpc_requests_total", labels) or 0.0


async def test_every_mistake_survives_the_wire(worker: grpc.aio.Channel) -> None:
    with pytest.raises(InvalidArgumentError, match="node: 2 mistakes") as caught:
        await heartbeat(worker, "mistaken")
    assert caught.value.violations == MISTAKES


async def test_an_error_of_the_service_is_not_taken_for_one_of_the_connection(worker: grpc.aio.Channel) -> None:
    with pytest.raises(UnavailableError, match=r"^the database is away$"):
        await heartbeat(worker, "away")


async def test_a_bug_says_nothing_about_itself(worker: grpc.aio.Channel) -> None:
    with pytest.raises(CortexError, match=r"^discovery at d:1: internal error$"):
        await heartbeat(worker, "buggy")


async def test_a_servicer_may_abort_by_hand(worker: grpc.aio.Channel) -> None:
    with pytest.raises(AlreadyExistsError, match="by hand"):
        await heartbeat(worker, "aborting")


async def test_an_unknown_method_is_told_so(worker: grpc.aio.Channel) -> None:
    call = worker.unary_unary(f"/{DISCOVERY}/Nonsense")
    with pytest.raises(CortexError, match="discovery does not know this call"), calling("discovery"):
        await call(b"")


async def test_a_method_that_a_library_does_not_serve_is_no_bug_of_ours(worker: grpc.aio.Channel) -> None:
    call = worker.unary_unary("/grpc.health.v1.Health/List")
    before = counted("List", "INTERNAL", "grpc.health.v1.Health")
    with pytest.raises(CortexError, match="discovery does not know this call"), calling("discovery"):
        await call(b"")
    assert counted("List", "INTERNAL", "grpc.health.v1.Health") == before


async def test_calls_are_counted_by_code(worker: grpc.aio.Channel) -> None:
    codes = {"": "OK", "mistaken": "INVALID_ARGUMENT", "buggy": "INTERNAL", "aborting": "ALREADY_EXISTS"}
    before = {code: counted("Heartbeat", code) for code in codes.values()}
    for region in codes:
        try:
            await heartbeat(worker, region)
        except CortexError:
            continue
    # A call is counted once it is over, which is a moment after its answer has arrived.
    labels = {"service": DISCOVERY, "method": "Heartbeat"}
    await eventually(lambda: REGISTRY.get_sample_value("cortex_rpc_open_requests", labels) == 0)
    assert {code: counted("Heartbeat", code) - before[code] for code in codes.values()} == dict.fromkeys(
        codes.values(), 1.0
    )


async def test_a_generator_knows_its_caller_and_ends_when_the_caller_leaves(
    gateway: grpc.aio.Channel, served: Served
) -> None:
    before = counted("WatchNodes", "CANCELLED")
    stream = discovery_pb2_grpc.DiscoveryServiceStub(gateway).WatchNodes(discovery_pb2.WatchNodesRequest())
    first = await anext(aiter(stream))
    assert first.nodes[0].name == "spiffe://cortex/gateway/g1"
    assert served.discovery.watching == 1
    stream.cancel()
    async with asyncio.timeout(5):
        await served.discovery.left.wait()
        await settle()
    assert counted("WatchNodes", "CANCELLED") == before + 1
    with pytest.raises(UnauthenticatedError, match="outside an RPC"):
        current_identity()


async def test_an_error_in_the_middle_of_a_stream_arrives(gateway: grpc.aio.Channel) -> None:
    request = discovery_pb2.WatchNodesRequest(refresh_s=1)
    answers = aiter(discovery_pb2_grpc.DiscoveryServiceStub(gateway).WatchNodes(request))
    await anext(answers)
    with pytest.raises(InvalidArgumentError, match="refresh_s") as caught, calling("discovery"):
        await anext(answers)
    assert caught.value.violations == MISTAKES


async def test_streams_in_both_directions_pass(worker: grpc.aio.Channel) -> None:
    stub = aggregator_pb2_grpc.WeightServiceStub(worker)
    requests = [aggregator_pb2.PushUpdateRequest(frame={"chunk": {"sealed": b"x" * size}}) for size in (3, 1 << 20)]
    answers = [answer.resume.first_chunk async for answer in stub.PushUpdate(iter(requests))]
    assert answers == [3, 1 << 20]
    pulled = stub.PullModel(aggregator_pb2.PullModelRequest())
    assert [answer.frame.chunk.index async for answer in pulled] == [0, 1, 2]


async def test_a_request_stream_with_one_answer_passes(serve_example: ServeExample, tls_of: TlsOf) -> None:
    service = "grpc.reflection.v1.ServerReflection"  # open to every role, and not otherwise served

    async def count(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"%d %s" % (len([each async for each in requests]), current_identity().name.encode())

    def attach(server: grpc.aio.Server) -> None:
        handlers = {"Count": grpc.stream_unary_rpc_method_handler(count)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async with (
        serve_example(extra=[attach]) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        assert await channel.stream_unary(f"/{service}/Count")(iter([b"a", b"b"])) == b"2 w1"


async def test_messages_and_metadata_have_a_limit(worker: grpc.aio.Channel) -> None:
    stub = aggregator_pb2_grpc.WeightServiceStub(worker)
    too_big = aggregator_pb2.PushUpdateRequest(frame={"chunk": {"sealed": b"x" * (5 << 20)}})
    with pytest.raises(OverloadedError, match="larger than max"), calling("aggregator"):
        async for _ in stub.PushUpdate(iter([too_big])):
            pass
    call = discovery_pb2_grpc.DiscoveryServiceStub(worker).Heartbeat
    with pytest.raises(OverloadedError, match="metadata"), calling("discovery"):
        await call(discovery_pb2.HeartbeatRequest(), metadata=(("much", "x" * 20_000),))


async def test_calls_beyond_the_servers_limit_are_refused(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with (
        serve_example(max_requests=1) as served,
        open_channel(served.address, tls_of(Role.GATEWAY, "g1"), Role.DISCOVERY) as channel,
    ):
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        stream = stub.WatchNodes(discovery_pb2.WatchNodesRequest())
        await anext(aiter(stream))
        with pytest.raises(OverloadedError), calling("discovery"):
            await stub.ListNodes(discovery_pb2.ListNodesRequest())
        stream.cancel()


async def test_an_old_connection_is_given_up_and_made_anew(serve_example: ServeExample, tls_of: TlsOf) -> None:
    async with (
        serve_example(connection_life_s=0.2, connection_grace_s=0.1) as served,
        open_channel(served.address, tls_of(Role.GATEWAY, "g1"), Role.DISCOVERY) as channel,
    ):
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        answers = aiter(stub.WatchNodes(discovery_pb2.WatchNodesRequest()))
        await anext(answers)
        with pytest.raises(UnavailableError), calling("discovery"):
            await anext(answers)
        await stub.ListNodes(discovery_pb2.ListNodesRequest(), wait_for_ready=True, timeout=10)


async def test_health_follows_the_service(served: Served, worker: grpc.aio.Channel) -> None:
    watch = aiter(health_pb2_grpc.HealthStub(worker).Watch(health_pb2.HealthCheckRequest(service=DISCOVERY)))
    said = health_pb2.HealthCheckResponse
    assert (await anext(watch)).status == said.SERVING
    served.running.set_serving(False)
    assert (await anext(watch)).status == said.NOT_SERVING
    served.running.set_serving(True)
    assert (await anext(watch)).status == said.SERVING


async def test_open_calls_may_finish_when_the_server_stops(serve_example: ServeExample, tls_of: TlsOf) -> None:
    channel = None
    async with asyncio.timeout(5), serve_example(stop_grace_s=0.2) as served:
        channel = open_channel(served.address, tls_of(Role.GATEWAY, "g1"), Role.DISCOVERY)
        answers = aiter(discovery_pb2_grpc.DiscoveryServiceStub(channel).WatchNodes(discovery_pb2.WatchNodesRequest()))
        await anext(answers)
    assert channel is not None
    with pytest.raises(UnavailableError), calling("discovery"):
        await anext(answers)
    await channel.close()


async def test_a_taken_port_is_told(served: Served, tls_of: TlsOf) -> None:
    settings = RpcSettings("127.0.0.1", served.running.port, tls_of(Role.DISCOVERY, "d2"), "cortex")
    with pytest.raises(PreconditionError, match=f"cannot listen at 127.0.0.1:{served.running.port}: the port is taken"):
        async with serving(settings, [], []):
            pass
