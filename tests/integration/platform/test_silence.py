"""An other end that says nothing any more, though the connection stands: both ends notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from cortex_common.clock import SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import discovery_pb2, discovery_pb2_grpc
from cortex_common.rpc.channel import channel_options
from cortex_common.rpc.tls import client_credentials, current_material
from tests.integration.platform.conftest import Served, ServeExample
from tests.links import SilentLink, over

# Seconds without a word before the other end is asked, and for its answer. Long enough that a busy machine is no
# silence; gRPC's own 60 s for the answer, were they not changed, are too long for the test.
NOTICES, NEVER_NOTICES, LIMIT_S = (1.0, 4.0), (3600.0, 3600.0), 40.0


@dataclass
class Far:
    """A server at the other end of a link, and a call to it that is open."""

    served: Served
    link: SilentLink
    call: Any


def options(after_s: float, timeout_s: float) -> list[tuple[str, str | int]]:
    """Those of a channel, with other times."""
    times = {"grpc.keepalive_time_ms": after_s, "grpc.keepalive_timeout_ms": timeout_s}
    times["grpc.http2.ping_timeout_ms"] = timeout_s
    # Without its probe of the line, whose pings would be answers missed too.
    set_ones = channel_options(Role.DISCOVERY, bulk=True)
    assert times.keys() <= {name for name, _ in set_ones}
    return [(name, int(times[name] * 1000) if name in times else value) for name, value in set_ones]


@asynccontextmanager
async def far_server(
    serve_example: ServeExample, tls: TlsFiles, client: tuple[float, float], server: tuple[float, float]
) -> AsyncIterator[Far]:
    """Over a link that can fall silent.

    Args:
        serve_example: Serves.
        tls: The caller's.
        client: Its times.
        server: Its times.
    """
    link = SilentLink(bytes_per_s=1e9)
    times = {
        "bulk": True,
        "keepalive_s": server[0],
        "keepalive_timeout_s": server[1],
        "min_ping_interval_s": NOTICES[0] / 10,
    }
    credentials = client_credentials(current_material(tls, SystemClock()))
    async with (
        serve_example(**times) as served,
        over(link, lambda: ("127.0.0.1", served.running.port)) as address,
        grpc.aio.secure_channel(address, credentials, options(*client)) as channel,
    ):
        call = discovery_pb2_grpc.DiscoveryServiceStub(channel).WatchNodes(discovery_pb2.WatchNodesRequest())
        await call.read()
        yield Far(served, link, call)


async def test_a_client_notices_that_its_server_is_silent(
    serve_example: ServeExample, tls_of: Callable[[Role, str], TlsFiles]
) -> None:
    tls = tls_of(Role.GATEWAY, "g1")
    async with far_server(serve_example, tls, NOTICES, NEVER_NOTICES) as far, asyncio.timeout(LIMIT_S):
        far.link.is_silent = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await far.call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert far.served.discovery.watching == 1, "only the client has noticed"


async def test_a_server_notices_that_its_client_is_silent(
    serve_example: ServeExample, tls_of: Callable[[Role, str], TlsFiles]
) -> None:
    tls = tls_of(Role.GATEWAY, "g1")
    async with far_server(serve_example, tls, NEVER_NOTICES, NOTICES) as far, asyncio.timeout(LIMIT_S):
        assert far.served.discovery.watching == 1
        far.link.is_silent = True
        await far.served.discovery.left.wait()
        assert not far.call.done(), "only the server has noticed"
        far.call.cancel()
