"""Who gets in, over real TLS."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cortex_common.errors import ForbiddenError, InvalidArgumentError, UnauthenticatedError, UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import channel_options, open_channel, open_sync_channel
from cortex_common.rpc.errors import calling
from cortex_common.rpc.metrics import REFUSALS
from cortex_common.security.authority import Authority
from cortex_common.security.certificates import certificate_of, read_certificate
from tests.fakes import ManualClock
from tests.integration.platform.conftest import Served, ServeExample

WORKER = Identity("cortex", Role.WORKER, NodeName("w1"))
TlsOf = Callable[[Role, str], TlsFiles]


async def heartbeat(channel: grpc.aio.Channel) -> float:
    with calling("discovery"):
        answer = await discovery_pb2_grpc.DiscoveryServiceStub(channel).Heartbeat(discovery_pb2.HeartbeatRequest())
    return answer.lease_s


def unchecked_channel(address: str, tls: TlsFiles | None, ca: Path) -> grpc.aio.Channel:
    """A channel of somebody who does not look at their own certificate first."""
    key, chain = (tls.key.read_bytes(), tls.certificate.read_bytes()) if tls else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, chain)
    return grpc.aio.secure_channel(address, credentials, channel_options(Role.DISCOVERY))


async def test_a_node_of_the_network_gets_in(served: Served, tls_of: TlsOf) -> None:
    async with open_channel(served.address, tls_of(Role.WORKER, "w-12"), Role.DISCOVERY) as channel:
        assert await heartbeat(channel) == len("w-12")
    async with open_channel(served.address, tls_of(Role.WORKER, "w-12"), Role.DISCOVERY, bulk=True) as channel:
        assert await heartbeat(channel) == len("w-12")


async def test_a_program_without_event_loop_gets_in(served: Served, tls_of: TlsOf) -> None:
    def call() -> float:
        with open_sync_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel:
            stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
            return stub.Heartbeat(discovery_pb2.HeartbeatRequest(), timeout=10).lease_s

    assert await asyncio.to_thread(call) == 2


async def test_without_certificate_nobody_gets_in(served: Served, authority: Authority) -> None:
    async with unchecked_channel(served.address, None, authority.ca) as channel:
        with pytest.raises(UnavailableError, match=r"discovery cannot be reached: .*certificate"):
            await heartbeat(channel)


async def test_without_tls_nobody_gets_in(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        with pytest.raises(UnavailableError, match="discovery cannot be reached"):
            await heartbeat(channel)


async def test_a_certificate_of_a_foreign_authority_does_not_count(
    served: Served, authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority.create("cortex", tmp_path / "ca").issue(WORKER, [], tmp_path / "w")
    async with unchecked_channel(served.address, foreign, authority.ca) as channel:
        with pytest.raises(UnavailableError, match="does not accept this node's certificate"):
            await heartbeat(channel)


async def test_a_server_of_a_foreign_authority_is_not_trusted(served: Served, tmp_path: Path) -> None:
    foreign = Authority.create("cortex", tmp_path / "ca").issue(WORKER, [], tmp_path / "w")
    async with open_channel(served.address, foreign, Role.DISCOVERY) as channel:
        with pytest.raises(UnavailableError, match="TLS refused: its certificate is not from the authority"):
            await heartbeat(channel)


async def test_an_expired_certificate_is_refused(served: Served, authority: Authority, tmp_path: Path) -> None:
    expired = authority.issue(WORKER, [], tmp_path, life=dt.timedelta(seconds=-1))
    with pytest.raises(UnauthenticatedError, match=r"tls.crt: certificate of spiffe://cortex/worker/w1 expired at "):
        open_channel(served.address, expired, Role.DISCOVERY)
    async with unchecked_channel(served.address, expired, authority.ca) as channel:
        with pytest.raises(UnavailableError, match="does not accept this node's certificate"):
            await heartbeat(channel)


async def test_a_server_does_not_start_with_an_expired_certificate(
    serve_example: ServeExample, authority: Authority, tmp_path: Path
) -> None:
    expired = authority.issue(WORKER, [], tmp_path, life=dt.timedelta(seconds=-1))
    with pytest.raises(UnauthenticatedError, match="expired at"):
        async with serve_example(tls=expired):
            pass


async def test_a_certificate_that_expires_during_the_connection_is_refused_at_the_next_call(
    serve_example: ServeExample, tls_of: TlsOf
) -> None:
    clock = ManualClock(wall_s=time.time())
    async with (
        serve_example(clock=clock) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        await heartbeat(channel)
        clock.jump_wall(25 * 3600)
        with pytest.raises(UnauthenticatedError, match=r"spiffe://cortex/worker/w1 expired at .*renew it"):
            await heartbeat(channel)
        clock.jump_wall(-50 * 3600)
        with pytest.raises(UnauthenticatedError, match=r"not valid before .*compare the clocks"):
            await heartbeat(channel)


def refusals() -> float:
    """Calls refused so far, whatever for."""
    return sum(sample.value for sample in next(iter(REFUSALS.collect())).samples if sample.name.endswith("_total"))


async def test_a_stream_ends_with_the_certificate(
    serve_example: ServeExample, authority: Authority, tls_of: TlsOf, tmp_path: Path
) -> None:
    identity = Identity("cortex", Role.DISCOVERY, NodeName("d1"))
    long = authority.issue(identity, [], tmp_path, life=dt.timedelta(days=2))
    tls = tls_of(Role.GATEWAY, "g1")
    clock = ManualClock(wall_s=certificate_of(tls).not_after.timestamp() - 0.3)
    async with (
        serve_example(clock=clock, tls=long) as served,
        open_channel(served.address, tls, Role.DISCOVERY) as channel,
    ):
        stream = discovery_pb2_grpc.DiscoveryServiceStub(channel).WatchNodes(discovery_pb2.WatchNodesRequest())
        answers = aiter(stream)
        await anext(answers)
        refused = refusals()
        with pytest.raises(UnauthenticatedError, match="expired at"), calling("discovery"):
            await anext(answers)
        assert served.discovery.watching == 0
        # Nobody was refused: the call was let in, and lasted longer than its certificate.
        assert refusals() == refused


async def test_a_node_of_another_network_is_refused(served: Served, authority: Authority, tmp_path: Path) -> None:
    # The same authority key, used for a second network.
    other = Authority("other", authority.directory).issue(Identity("other", Role.WORKER, NodeName("w1")), [], tmp_path)
    async with open_channel(served.address, other, Role.DISCOVERY) as channel:
        with pytest.raises(
            UnauthenticatedError, match=r"spiffe://other/worker/w1 belongs to another network.*'cortex'"
        ):
            await heartbeat(channel)


async def test_the_wrong_role_is_refused(served: Served, tls_of: TlsOf) -> None:
    async with open_channel(served.address, tls_of(Role.OPERATOR, "ann"), Role.DISCOVERY) as channel:
        with pytest.raises(ForbiddenError, match=r"operator 'ann' may not call /cortex.v1.DiscoveryService/Heartbeat"):
            await heartbeat(channel)


async def test_a_server_of_the_wrong_role_is_not_spoken_to(served: Served, tls_of: TlsOf) -> None:
    async with open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.COORDINATOR) as channel:
        with pytest.raises(UnavailableError, match="TLS refused: a node of another role answers there"):
            await heartbeat(channel)


@pytest.mark.parametrize("role", Role)
async def test_health_and_reflection_answer_every_node(served: Served, tls_of: TlsOf, role: Role) -> None:
    async with open_channel(served.address, tls_of(role, "n1"), Role.DISCOVERY) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {service.name async for answer in reflection for service in answer.list_services_response.service}
        assert {"cortex.v1.DiscoveryService", "cortex.v1.WeightService", "grpc.health.v1.Health"} <= names


def server_serial(port: int, tls: TlsFiles) -> int:
    """Serial number of the certificate shown in a new handshake."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=Role.DISCOVERY.server_name) as secured,
    ):
        assert secured.version() == "TLSv1.3"
        der = secured.getpeercert(binary_form=True)
    assert der is not None
    return read_certificate(ssl.DER_cert_to_PEM_cert(der).encode()).serial


async def test_a_replaced_certificate_is_shown_in_new_handshakes(
    serve_example: ServeExample, authority: Authority, tls_of: TlsOf, tmp_path: Path
) -> None:
    identity = Identity("cortex", Role.DISCOVERY, NodeName("d1"))
    tls = authority.issue(identity, [], tmp_path)
    first = certificate_of(tls).serial
    async with (
        serve_example(tls=tls) as served,
        open_channel(served.address, tls_of(Role.WORKER, "w1"), Role.DISCOVERY) as channel,
    ):
        port, caller = served.running.port, tls_of(Role.WORKER, "w1")
        await heartbeat(channel)
        assert await asyncio.to_thread(server_serial, port, caller) == first
        # Half a replacement: the key is new, the certificate still the old one.
        certificate = tls.certificate.read_bytes()
        second = certificate_of(authority.issue(identity, [], tmp_path)).serial
        renewed = tls.certificate.read_bytes()
        tls.certificate.write_bytes(certificate)
        assert await asyncio.to_thread(server_serial, port, caller) == first
        tls.certificate.write_bytes(renewed)
        assert await asyncio.to_thread(server_serial, port, caller) == second != first
        await heartbeat(channel)


async def test_unusable_tls_files_are_told_by_name(tls_of: TlsOf, tmp_path: Path) -> None:
    worker, other = tls_of(Role.WORKER, "w1"), tls_of(Role.WORKER, "w2")
    with pytest.raises(InvalidArgumentError, match=r"private key .*w2/tls.key does not belong to certificate .*w1"):
        open_channel("127.0.0.1:1", TlsFiles(worker.ca, worker.certificate, other.key), Role.DISCOVERY)
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    with pytest.raises(InvalidArgumentError, match=r"authority certificate .*junk.pem is not a PEM certificate"):
        open_channel("127.0.0.1:1", TlsFiles(junk, worker.certificate, worker.key), Role.DISCOVERY)
    with pytest.raises(InvalidArgumentError, match=r"private key .*junk.pem is not a usable PEM key"):
        open_channel("127.0.0.1:1", TlsFiles(worker.ca, worker.certificate, junk), Role.DISCOVERY)
