"""A worker with a certificate whose site lets out nothing but CONNECT through a proxy: gRPC, mutual TLS end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cortex_common.identity import Role, TlsFiles
from tests.integration.worker.harness import network_of
from tests.proxies import Proxy


@pytest.mark.parametrize("variable", ["https_proxy", "grpc_proxy"])
async def test_whole_rounds_go_through_the_proxy_that_the_environment_names(
    variable: str, tls_of: Callable[[Role, str], TlsFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with network_of(tls_of, tmp_path) as network, Proxy().running() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        await network.worker("w1")
        await network.one_round()
        asked = set(proxy.asked)
    assert {f"CONNECT {address}" for address in (network.coordinator_address, network.aggregator_address)} <= asked
