"""Through TLS and through a proxy, whole rounds; and peers that are slow."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex_common.errors import UnauthenticatedError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.network import messages as m
from cortex_common.network.websocket_link import GatewayAccess, open_link
from cortex_common.security.authority import Authority
from cortex_common.security.node_tokens import NodeToken
from tests.integration.worker.harness import network_of, working
from tests.proxies import Proxy

TlsOf = Callable[[Role, str], TlsFiles]


async def test_a_worker_behind_a_proxy_trains_over_tls(tls_of: TlsOf, tmp_path: Path) -> None:
    tls = tls_of(Role.GATEWAY, "gateway-1")
    https = {"http_certificate": tls.certificate, "http_key": tls.key}
    async with network_of(tls_of, tmp_path, "websocket") as network, Proxy().running() as proxy:
        assert network.nodes is not None
        token = (await network.nodes.token("w1", region="local")).encode()
        async with network.nodes.gateway(network.coordinator_address, **https) as url:
            assert url.startswith("wss://")
            access = {"gateway_url": url, "node_token": token, "gateway_ca": tls.ca}
            async with working("w1", tmp_path, gateway_proxy=proxy.url, **access):
                await network.one_round()
        assert len(proxy.asked) >= 2, "the line, and the weights"
        assert set(proxy.asked) == {f"CONNECT {url.removeprefix('wss://')}"}


async def test_nodes_come_with_tls_1_3_only(tls_of: TlsOf, tmp_path: Path) -> None:
    tls = tls_of(Role.GATEWAY, "gateway-1")
    https = {"http_certificate": tls.certificate, "http_key": tls.key}
    async with network_of(tls_of, tmp_path, "websocket") as network:
        assert network.nodes is not None
        async with network.nodes.gateway(network.coordinator_address, **https) as url:
            host, port = url.removeprefix("wss://").split(":")
            context = ssl.create_default_context(cafile=str(tls.ca))
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            writer.close()
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(host, int(port), ssl=context)


async def test_the_environment_may_name_the_proxy(
    tls_of: TlsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = tls_of(Role.GATEWAY, "gateway-1")
    https = {"http_certificate": tls.certificate, "http_key": tls.key}
    async with network_of(tls_of, tmp_path, "websocket") as network, Proxy().running() as proxy:
        assert network.nodes is not None
        token = await network.nodes.token("w1")
        async with network.nodes.gateway(network.coordinator_address, **https) as url:
            for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("https_proxy", proxy.url)
            link = await open_link(
                GatewayAccess(url, token, m.Hello("w1", "eu", "1"), "ab" * 32, tls.ca), attends=False
            )
            await link.close()
            assert f"CONNECT {url.removeprefix('wss://')}" in proxy.asked


async def test_a_gateway_that_is_not_trusted_and_a_proxy_that_refuses_are_named(tls_of: TlsOf, tmp_path: Path) -> None:
    tls = tls_of(Role.GATEWAY, "gateway-1")
    https = {"http_certificate": tls.certificate, "http_key": tls.key}
    stranger = tmp_path / "other.pem"
    stranger.write_bytes(Authority.create("other", tmp_path / "other").bundle)
    async with network_of(tls_of, tmp_path, "websocket") as network, Proxy(refuses=True).running() as proxy:
        assert network.nodes is not None
        async with network.nodes.gateway(network.coordinator_address, **https) as url:
            access = GatewayAccess(url, NodeToken.fresh(), m.Hello("w1", "eu", "1"), "ab" * 32, ca=stranger, proxy=None)
            with pytest.raises(UnauthenticatedError, match=f"certificate of {url} is not trusted"):
                await open_link(access, attends=True)
            behind = GatewayAccess(url, access.token, access.hello, "ab" * 32, ca=tls.ca, proxy=proxy.url)
            with pytest.raises(UnavailableError, match=r"the proxy to .* refused: .*407"):
                await open_link(behind, attends=True)
