"""/metrics, /healthz and /readyz over HTTP."""

from __future__ import annotations

import httpx
import pytest

from cortex_common.errors import PreconditionError
from cortex_common.telemetry.metrics import counter
from cortex_common.telemetry.ops_server import ops_server


async def test_operators_see_health_readiness_and_metrics() -> None:
    state = (False, "discovery cannot be reached")
    counter("cortex_test_asked_total", "Times asked.").inc()
    async with (
        ops_server("127.0.0.1", 0, lambda: state) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}") as client,
    ):
        assert (await client.get("/healthz")).json()["status"] == "alive"
        not_ready = await client.get("/readyz")
        assert not_ready.status_code == 503
        assert not_ready.json() == {"ready": False, "reason": "discovery cannot be reached"}
        state = (True, "serving")
        assert (await client.get("/readyz")).status_code == 200
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "cortex_test_asked_total 1.0" in metrics.text
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        assert (await client.get("/")).status_code == 404


async def test_a_taken_port_is_told() -> None:
    async with ops_server("127.0.0.1", 0, lambda: (True, "")) as running:
        with pytest.raises(
            PreconditionError, match=f"cannot listen at 127.0.0.1:{running.port}: Address already in use"
        ):
            async with ops_server("127.0.0.1", running.port, lambda: (True, "")):
                pass
