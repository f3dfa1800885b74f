"""The network of the worker's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.worker.harness import Network, TlsOf, network_of


@pytest.fixture
async def network(tls_of: TlsOf, tmp_path: Path) -> AsyncIterator[Network]:
    async with network_of(tls_of, tmp_path) as made:
        yield made
