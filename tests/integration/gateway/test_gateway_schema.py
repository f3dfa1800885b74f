"""The API as its own documentation describes it: asked everything by schemathesis, over a real coordinator."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import jsonschema_rs
import pytest

from cortex_common.clock import SystemClock
from cortex_common.identity import Role
from cortex_common.security.tokens import TokenStore
from services.gateway.main import run
from services.gateway.settings import GatewaySettings
from tests.integration.coordinator.harness import Site

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = Path(__file__).with_name("schemathesis.toml")
JOB = {
    "name": "digits",
    "model": {"input_dim": 64, "output_dim": 10},
    "data": {"train": "digits"},
    "placement": {"workers": 1},
}


@asynccontextmanager
async def real_gateway(tls_of: Callable, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """URL and token of a gateway before the real coordinator, with one running and one cancelled job."""
    site = Site(tls_of, folder)
    for service in ("discovery", "coordinator"):
        await site.start(service)
    tls, tokens = tls_of(Role.GATEWAY), folder / "tokens.json"
    token = TokenStore(tokens).create("alice", ["read", "submit"], timedelta(hours=1))
    settings = GatewaySettings(
        ca=tls.ca,
        certificate=tls.certificate,
        key=tls.key,
        name="gateway-1",
        port=0,
        websocket_port=0,
        state_dir=folder / "gateway",
        tokens=tokens,
        coordinator=site.coordinator,
        discovery=site.discovery,
        requests_per_s=1e6,
        requests_burst=1e6,
        bad_tokens_per_s=1e6,
        bad_tokens_burst=1e6,
    )
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(settings, SystemClock(), stop, started))
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield started.result().url, token
    finally:
        stop.set()
        await task
        await site.close()


async def test_every_answer_in_the_documentation_has_an_example_that_fits_its_schema(gateway):
    document = (await gateway.http.get("/openapi.json")).json()
    seen = 0
    for path, method, status, media_type, content in answers(document):
        where = f"{method.upper()} {path}: {status} {media_type}"
        found = (
            [content["example"]] if "example" in content else [e["value"] for e in content.get("examples", {}).values()]
        )
        assert found, f"{where} has no example"
        for example in found:
            if media_type.endswith("json"):
                jsonschema_rs.validate({**content["schema"], "components": document["components"]}, example)
            seen += 1
    assert seen > 60


def answers(document: dict) -> Iterator[tuple[str, str, str, str, dict]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                for media_type, content in response.get("content", {}).items():
                    yield path, method, status, media_type, content


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.asyncio(loop_scope="function")
async def test_nothing_that_schemathesis_asks_breaks_a_promise_of_the_documentation(tls_of, tmp_path):
    async with real_gateway(tls_of, tmp_path) as (url, token):
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=url, headers=headers) as http:
            job = (await http.post("/api/v1/jobs/submit", json=JOB)).json()["job_id"]
            await http.post(f"/api/v1/jobs/{job}/cancel")
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", str(CONFIG), "run", f"{url}/openapi.json", "--max-time", "60"),
            *("--header", f"Authorization: Bearer {token}", "--max-examples", "5", "--seed", "1", "--no-color"),
            *("--phases", "examples,coverage,fuzzing", "--request-timeout", "10", "--generation-database", "none"),
            *("--exclude-path", "/metrics"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        output = (await run.communicate())[0].decode()
    assert run.returncode == 0, output
