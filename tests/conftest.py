"""Fixtures shared by all tests: a throw-away certificate authority and a clock."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.rpc.tls13 import require_tls13
from cortex_common.security.authority import Authority
from tests.areas import expanded
from tests.fakes import ManualClock

# Before any test imports gRPC: servers in this process are like those of services.
require_tls13()

# Tests say nothing about wall time: the machine may be busy.
settings.register_profile("cortex", deadline=None)
settings.load_profile("cortex")

# A shell's background jobs are started with SIGINT ignored, their children too; tests press Ctrl-C as on a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

NETWORK = "cortex"
HOSTS = ("localhost", "127.0.0.1", "::1")


def pytest_configure(config: pytest.Config) -> None:
    """The file of an area stands for its tests."""
    config.args[:] = expanded(config.args, config.invocation_params.dir)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority of the test network."""
    return Authority.create(NETWORK, tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls_of(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Role, str], TlsFiles]:
    """Certificates of the test network, one per role and name: `tls_of(Role.WORKER, "w1")`."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    issued: dict[Identity, TlsFiles] = {}

    def issue(role: Role, name: str = "") -> TlsFiles:
        identity = Identity(NETWORK, role, NodeName(name or f"{role.value}-1"))
        if identity not in issued:
            issued[identity] = authority.issue(identity, HOSTS, folder / role.value / identity.name)
        return issued[identity]

    return issue


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """What a test sets up for logs is undone."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], root.level = before
