"""Networks of the coordinator's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cortex_common.identity import Role, TlsFiles
from tests.integration.coordinator.harness import Site, site


@pytest.fixture
async def cortex(tls_of: Callable[[Role, str], TlsFiles], tmp_path: Path) -> AsyncIterator[Site]:
    """Discovery, a coordinator and one aggregator, in region eu."""
    async with site(tls_of, tmp_path) as made:
        yield made


@pytest.fixture
async def two_regions(cortex: Site) -> None:
    """`cortex` has an aggregator in region us too."""
    await cortex.start("aggregator-us", "us")
