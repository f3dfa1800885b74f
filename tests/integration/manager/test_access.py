"""Finding the network, or saying clearly why not: dead ports, slow ones, and tokens that are not good."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cortex.integration.access import Access
from cortex.integration.manager import CortexManager
from cortex.integration.settings import ManagerSettings, load_manager_settings
from cortex.local.layout import Layout
from cortex.local.members import Member
from cortex.local.network import LocalNetwork, OperatorFiles, write_network
from cortex_common.clock import SystemClock
from cortex_common.errors import CortexError, InvalidArgumentError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.sealing import SealingKey
from tests.integration.worker.gateways import node_network
from tests.unit.manager.test_manager_settings import CONTRACT
from tests.waiting import eventually


def settings_of(folder: Path, **variables: str) -> ManagerSettings:
    path = folder / "config.yaml"
    path.write_text(CONTRACT)
    given = {f"CORTEX_{key}": value for key, value in variables.items()}
    return load_manager_settings(path, {"CORTEX_STATE_DIR": str(folder / "state"), **given})


async def refusal(settings: ManagerSettings, waits: list[str] | None = None) -> CortexError:
    with pytest.raises(CortexError) as caught:
        await Access(settings, SealingKey("cortex")).check((waits if waits is not None else []).append)
    return caught.value


@pytest.fixture(autouse=True)
def _no_network_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


async def test_a_dead_port_is_tried_as_often_as_the_file_says_then_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        settings = settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url, NETWORK__RETRY_ATTEMPTS="3")
        waits: list[str] = []
        error = await refusal(settings, waits)
    assert isinstance(error, UnavailableError)
    assert f"no Cortex network answers at {url} after 3 attempts" in error.message
    assert "cortex up --detach" in error.message
    assert [wait.partition(":")[0] for wait in waits] == ["attempt 1 of 3", "attempt 2 of 3"]


@asynccontextmanager
async def silent_port() -> AsyncIterator[tuple[str, list[float]]]:
    """Takes connections and never says a word; when each came."""
    came: list[float] = []
    over = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(asyncio.get_running_loop().time())
        await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", came
    finally:
        over.set()
        server.close()


async def test_a_port_that_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    async with silent_port() as (url, came):
        limits = {"NETWORK__RETRY_ATTEMPTS": "2", "NETWORK__CONNECTION_TIMEOUT": "0.4"}
        settings = settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url, **limits)
        error = await refusal(settings)
        ended_s = asyncio.get_running_loop().time()
    assert "after 2 attempts" in error.message
    assert len(came) == 2
    # Each attempt lasts what the file says, and not much longer than that.
    assert came[1] - came[0] >= 0.4
    assert 0.39 <= ended_s - came[1] < 5


async def test_tokens_that_are_not_good_are_refused_with_the_reason_and_not_tried_again(tls_of, tmp_path: Path) -> None:
    async with node_network(tls_of, tmp_path) as nodes, nodes.gateway("127.0.0.1:9") as url:
        expired = await nodes.token("local_node_1", region="local", life_s=0.3)
        ends_s = SystemClock().wall_s() + 0.3
        other = await nodes.token("local_node_2", region="local")
        good = await nodes.token("local_node_1", region="local")
        await eventually(lambda: SystemClock().wall_s() >= ends_s)
        for token, reason in (
            (NodeToken.fresh(), "not known here"),
            (expired, "expired: ask the operator"),
            (other, "is for 'local_node_2'"),
        ):
            given = {"NETWORK__WEBSOCKET_URL": url, "NETWORK__TOKEN": token.encode()}
            waits: list[str] = []
            assert reason in (await refusal(settings_of(tmp_path, **given), waits)).message
            assert not waits
        given["NETWORK__TOKEN"] = good.encode()
        access = Access(settings_of(tmp_path, **given), SealingKey("cortex"))
        assert await access.check() == good
        assert access.network == "cortex"


async def test_a_network_without_a_token_says_how_to_get_one(tls_of, tmp_path: Path) -> None:
    async with node_network(tls_of, tmp_path) as nodes, nodes.gateway("127.0.0.1:9") as url:
        error = await refusal(settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url))
    assert "cortex node token --gateway --name local_node_1 --region local" in error.message


async def test_encryption_cannot_be_switched_off(tmp_path: Path) -> None:
    settings_of(tmp_path)
    manager = CortexManager(tmp_path / "config.yaml", {"CORTEX_SECURITY__ENABLE_ENCRYPTION": "false"})
    with pytest.raises(InvalidArgumentError, match=r"enable_encryption: false given; .* sealed updates only") as caught:
        await manager.initialize()
    assert "no setting that allows others" in caught.value.message
    assert caught.value.message.endswith("allowed: true")


async def test_a_key_is_made_once_with_mode_0600_and_a_given_one_is_used(tmp_path: Path) -> None:
    path = tmp_path / "sealing.key"
    made, is_new = SealingKey.kept("cortex", path)
    again, is_new_again = SealingKey.kept("cortex", path)
    assert (is_new, is_new_again, made.public) == (True, False, again.public)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SealingKey.of("cortex", bytes(range(32))).public == SealingKey.of("cortex", bytes(range(32))).public
    assert SealingKey.of("cortex", bytes(range(32))).public != made.public


@asynccontextmanager
async def answering(head: bytes) -> AsyncIterator[str]:
    """Something that speaks HTTP, and gives everybody this answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + head + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_another_http_server_is_told_from_a_network_that_is_away(tmp_path: Path) -> None:
    limits = {"NETWORK__RETRY_ATTEMPTS": "1"}
    async with answering(b"404 Not Found") as url:
        error = await refusal(settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url, **limits))
    assert "answers HTTP 404: no gateway of Cortex takes nodes there; look at the port and the path" in error.message
    async with answering(b"503 Service Unavailable") as url:
        error = await refusal(settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url, **limits))
    assert f"{url} answers HTTP 503. Start a network" in error.message


async def test_where_the_network_of_this_machine_takes_nodes_is_told(
    tls_of: Callable[[Role, str], TlsFiles], tmp_path: Path
) -> None:
    tls = tls_of(Role.OPERATOR, "operator")
    ports = {"http": 18080, "websocket": 18765}
    members = (
        Member(name="gateway-1", service=Role.GATEWAY, region="eu", ports=ports),
        Member(name="coordinator-1", service=Role.COORDINATOR, region="eu", ports={"grpc": 18051}),
        Member(name="discovery-1", service=Role.DISCOVERY, region="eu", ports={"grpc": 18052}),
    )
    operator = OperatorFiles(ca=tls.ca, certificate=tls.certificate, key=tls.key)
    layout = Layout.of(tmp_path / ".cortex")
    layout.root.mkdir()
    write_network(layout, LocalNetwork(members=members, operator=operator))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        error = await refusal(settings_of(tmp_path, NETWORK__WEBSOCKET_URL=url, NETWORK__RETRY_ATTEMPTS="1"))
    assert "takes nodes at ws://127.0.0.1:18765: set network.websocket_url to it" in error.message
    assert str(layout.root) in error.message
