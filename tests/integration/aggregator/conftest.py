from __future__ import annotations

import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from cortex_common.identity import TlsFiles
from tests.integration.aggregator.harness import Cluster, running_cluster


@pytest.fixture
async def cluster(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Cluster]:
    """An aggregator with an empty state directory."""
    async with running_cluster(tls_of, tmp_path / "state") as running:
        yield running


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Makes the disk full, as far as this process is concerned, at a file size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
