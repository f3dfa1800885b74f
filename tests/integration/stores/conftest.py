"""One server of each kind for all of these tests."""

from __future__ import annotations

import pytest

from tests.integration.stores.servers import postgres, seaweed


@pytest.fixture(scope="session")
def postgres_server():
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server
