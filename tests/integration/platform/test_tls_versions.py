"""Which versions of TLS get in: at ports of services as `cortex serve` starts them, and in tests."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cortex_common.errors import PreconditionError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.rpc.tls13 import require_tls13
from cortex_common.security.authority import Authority
from tests.integration.platform.conftest import Served, ServeExample
from tests.waiting import until

TlsOf = Callable[[Role, str], TlsFiles]
OLD, NEW = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
VARIABLE = "GRPC_SSL_CIPHER_SUITES"


def spoken(port: int, tls: TlsFiles, newest: ssl.TLSVersion) -> str | None:
    """The version that a client with a good certificate, and with nothing newer than `newest`, speaks there."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    context.maximum_version = newest
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname=Role.DISCOVERY.server_name) as secured,
    ):
        return secured.version()


def check(port: int, tls: TlsFiles) -> None:
    """TLS 1.3 gets in there, and TLS 1.2 does not."""
    assert spoken(port, tls, NEW) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        spoken(port, tls, OLD)


def environment() -> dict[str, str]:
    """That of a person's shell: without what these tests have set."""
    kept = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@contextmanager
def discovery(folder: Path, authority: Authority, tls: TlsFiles) -> Iterator[dict[str, Any]]:
    """Discovery as `cortex serve` runs it; what its ready file says."""
    settings = {
        **{"name": "d1", "state_dir": folder / "state", "ready_file": folder / "ready.json"},
        **{"ca": tls.ca, "certificate": tls.certificate, "key": tls.key},
        **{"authority": authority.directory, "port": 0, "enrolment_port": 0},
    }
    config = folder / "discovery.yaml"
    plain = {key: value if isinstance(value, int) else str(value) for key, value in settings.items()}
    config.write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-m", "cortex", "serve", "discovery", "--config", str(config)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        ready = folder / "ready.json"
        until(lambda: ready.exists() or process.poll() is not None, 60)
        assert process.poll() is None, (folder / "log").read_text()
        yield json.loads(ready.read_text())
    finally:
        process.terminate()
        process.wait(60)


def test_a_service_takes_tls_1_3_only(tmp_path: Path) -> None:
    authority = Authority.create("cortex", tmp_path / "authority")
    own = authority.issue(Identity("cortex", Role.DISCOVERY, NodeName("d1")), ["127.0.0.1"], tmp_path / "d1")
    caller = authority.issue(Identity("cortex", Role.WORKER, NodeName("w1")), [], tmp_path / "w1")
    with discovery(tmp_path, authority, own) as facts:
        for address in (facts["address"], facts["enrolment"]):
            check(int(address.rpartition(":")[2]), caller)


async def test_so_do_servers_of_tests(served: Served, tls_of: TlsOf) -> None:
    await asyncio.to_thread(check, served.running.port, tls_of(Role.WORKER, "w1"))


async def test_a_server_that_would_take_older_versions_does_not_start(
    serve_example: ServeExample, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, "HIGH"):
        with monkeypatch.context() as changed:
            changed.delenv(VARIABLE) if value is None else changed.setenv(VARIABLE, value)
            with pytest.raises(PreconditionError, match=r"TLS 1\.3 only, .*`cortex serve`"):
                async with serve_example():
                    pass
    require_tls13()


def test_a_program_that_uses_the_sdk_keeps_its_own_settings_of_grpc() -> None:
    program = (
        "import os, cortex, cortex.client, cortex.integration.manager, services.worker.embedded, grpc\n"
        "assert cortex.CortexManager\n"
        f"print(os.environ.get({VARIABLE!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), check=True, capture_output=True, text=True
    )
    assert done.stdout == "None\n"
