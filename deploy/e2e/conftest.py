"""What all of these tests do when one fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logs_of_what_failed(request: pytest.FixtureRequest) -> Iterator[None]:
    """The state and the last lines of all containers of the test's compose network, if it has one."""
    network = request.getfixturevalue("network") if "network" in request.fixturenames else None
    failed = request.session.testsfailed
    yield
    if network is not None and request.session.testsfailed > failed:
        print(network.run("ps", "--all"), network.run("logs", "--tail", "40"))
