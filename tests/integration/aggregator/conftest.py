from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cortex_common.identity import TlsFiles
from tests.integration.aggregator.harness import Cluster, running_cluster


@pytest.fixture
async def cluster(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Cluster]:
    """An aggregator with an empty state directory."""
    async with running_cluster(tls_of, tmp_path / "state") as running:
        yield running
