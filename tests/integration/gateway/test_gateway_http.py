"""What holds for every path: tokens, unknown paths, health, network, metrics, documentation, start and end."""

from __future__ import annotations

import asyncio
import json
import ssl
import warnings
from datetime import timedelta

import httpx
import pytest

from cortex_common.errors import InvalidArgumentError, PreconditionError
from cortex_common.identity import Role
from cortex_common.pb.v1 import common_pb2
from cortex_common.settings import load_settings
from services.gateway.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEEDS_READ = [
    ("GET", "/api/v1/jobs"),
    ("GET", "/api/v1/jobs/job-1/status"),
    ("GET", "/api/v1/jobs/job-1/versions"),
    ("GET", "/api/v1/jobs/job-1/model"),
    ("GET", "/api/v1/jobs/job-1/events"),
    ("GET", "/api/v1/network/status"),
    ("GET", "/api/v1/network/resources"),
]
NEEDS_SUBMIT = [
    ("POST", "/api/v1/jobs/submit"),
    ("POST", "/api/v1/jobs/job-1/cancel"),
    ("POST", "/api/v1/jobs/job-1/pause"),
    ("POST", "/api/v1/jobs/job-1/resume"),
]
OPEN = ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"]


def worker(name: str, region: str, health=common_pb2.NODE_HEALTH_LIVE, **resources) -> common_pb2.Node:
    return common_pb2.Node(
        name=name,
        role=common_pb2.ROLE_WORKER,
        region=region,
        health=health,
        activity="training",
        version="0.1",
        lease_left_s=8.0,
        resources=common_pb2.Resources(cpu_cores=4, slots=2, free_slots=1, **resources),
        datasets=[common_pb2.DatasetInfo(name="digits")],
    )


async def test_every_api_path_needs_a_token_with_the_right_scope(gateway):
    reader, nobody = gateway.bearer("read"), {"Authorization": ""}
    documented = (await gateway.http.get("/openapi.json")).json()["paths"]
    operations = {(m.upper(), p) for p, methods in documented.items() for m in methods if p.startswith("/api/")}
    listed = {(m, p.replace("job-1", "{job_id}")) for m, p in NEEDS_READ + NEEDS_SUBMIT}
    assert operations == listed  # a new path needs a line here
    for method, path in NEEDS_READ + NEEDS_SUBMIT:
        response = await gateway.http.request(method, path, headers=nobody)
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"].startswith('Bearer realm="cortex"')
    for method, path in NEEDS_SUBMIT:
        response = await gateway.http.request(method, path, headers=reader)
        assert response.status_code == 403, path
        assert "insufficient_scope" in response.headers["www-authenticate"]
        assert response.json()["detail"] == "token 'bob' has the scopes read; this needs submit"
    for method, path in NEEDS_READ:
        assert (await gateway.http.request(method, path, headers=reader)).status_code == 200, path
    assert "SubmitJob" not in gateway.jobs.calls


async def test_a_missing_token_and_a_wrong_one_are_told_apart(gateway):
    async with httpx.AsyncClient(base_url=gateway.url) as stranger:
        response = await stranger.get("/api/v1/jobs")
        assert response.headers["www-authenticate"] == 'Bearer realm="cortex"'
        assert "Authorization: Bearer" in response.json()["detail"]
        for given in ("Bearer nonsense", f"Bearer {gateway.token}x", "Basic YTpi"):
            response = await stranger.get("/api/v1/jobs", headers={"Authorization": given})
            assert response.status_code == 401
            assert "invalid_token" in response.headers["www-authenticate"]


async def test_an_expired_or_revoked_token_is_refused(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        short = gateway.bearer("read", life=timedelta(microseconds=1))
        response = await gateway.http.get("/api/v1/jobs", headers=short)
        assert (response.status_code, "expired at" in response.json()["detail"]) == (401, True)
        gateway.tokens.revoke(gateway.token.split("_")[1])
        assert (await gateway.http.get("/api/v1/jobs")).status_code == 401


async def test_an_administrator_may_read_and_submit_and_who_may_submit_only_may_not_read(gateway):
    admin, submitter = gateway.bearer("admin"), gateway.bearer("submit")
    assert (await gateway.http.get("/api/v1/jobs", headers=admin)).status_code == 200
    assert (await gateway.http.post("/api/v1/jobs/job-1/cancel", headers=admin)).status_code == 200
    assert (await gateway.http.get("/api/v1/jobs", headers=submitter)).status_code == 403


@pytest.mark.parametrize("path", OPEN)
async def test_operations_and_documentation_need_no_token(gateway, path):
    async with httpx.AsyncClient(base_url=gateway.url) as stranger:
        assert (await stranger.get(path)).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("GET", "/api/v1/jobs/"), ("POST", "/api/v2/jobs")])
async def test_unknown_paths_are_404_problems(gateway, method, path):
    response = await gateway.http.request(method, path)
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert path in response.json()["detail"]


async def test_a_wrong_method_is_405_and_names_the_right_one(gateway):
    response = await gateway.http.get("/api/v1/jobs/job-1/cancel")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert "allowed: POST" in response.json()["detail"]


async def test_answers_carry_safe_headers(gateway):
    headers = (await gateway.http.get("/api/v1/jobs")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


async def test_the_network_is_shown_by_region(gateway):
    gateway.nodes.nodes = [worker("w1", "eu"), worker("w2", "us", common_pb2.NODE_HEALTH_EXPIRED)]
    status = (await gateway.http.get("/api/v1/network/status")).json()
    assert status["status"] == "degraded"
    assert "worker w2 in us is gone" in status["reasons"][-1]
    (node,) = status["regions"]["eu"]["nodes"]
    assert (node["name"], node["role"], node["health"]) == ("w1", "worker", "live")
    assert (node["activity"], node["version"], node["lease_left_s"]) == ("training", "0.1", 8.0)
    assert status["regions"]["us"]["status"] == "degraded"


async def test_resources_are_summed_over_live_workers(gateway):
    gateway.nodes.nodes = [
        worker("w1", "eu", gpus=[common_pb2.Gpu(name="G", memory_bytes=10)]),
        worker("w2", "us"),
        worker("w3", "us", common_pb2.NODE_HEALTH_SUSPECT),
    ]
    found = (await gateway.http.get("/api/v1/network/resources")).json()
    total = found["total"]
    assert (total["workers"], total["cpu_cores"], total["slots"], total["free_slots"]) == (2, 8, 4, 2)
    assert (total["gpus"], total["datasets"]) == (1, ["digits"])
    assert found["regions"]["us"]["workers"] == 1


async def test_without_discovery_the_network_cannot_be_shown(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        await gateway.stop_peer(Role.DISCOVERY)
        response = await gateway.http.get("/api/v1/network/status")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "discovery at" in response.json()["detail"]


async def test_readiness_names_the_service_that_is_away_and_liveness_does_not_care(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        assert (await gateway.http.get("/readyz")).json() == {
            "status": "ok",
            "checks": {"coordinator": "ok", "discovery": "ok"},
        }
        await gateway.stop_peer(Role.COORDINATOR)
        response = await gateway.http.get("/readyz")
        assert response.status_code == 503
        assert response.json()["checks"]["discovery"] == "ok"
        assert "cannot be reached" in response.json()["checks"]["coordinator"]
        assert (await gateway.http.get("/healthz")).json() == {"status": "ok"}


async def test_requests_are_counted_by_route_never_by_id(gateway):
    await gateway.http.get("/api/v1/jobs/job-1/status")
    await gateway.http.get("/some/random/path-4711")
    text = (await gateway.http.get("/metrics")).text
    assert 'cortex_gateway_requests_total{method="GET",route="/api/v1/jobs/{job_id}/status",status="200"}' in text
    assert "job-1" not in text
    assert "path-4711" not in text
    assert "cortex_build_info" in text


async def test_the_documentation_describes_jobs_examples_and_problems(gateway):
    document = (await gateway.http.get("/openapi.json")).json()
    submit = document["paths"]["/api/v1/jobs/submit"]["post"]
    assert set(submit["requestBody"]["content"]) == {"application/json", "application/yaml"}
    for shape in submit["requestBody"]["content"]["application/json"]["examples"].values():
        assert (await gateway.http.post("/api/v1/jobs/submit", json=shape["value"])).status_code == 201
    assert {"201", "400", "401", "403", "413", "415", "422", "503"} <= set(submit["responses"])
    assert "application/problem+json" in submit["responses"]["422"]["content"]
    assert {"JobSpec", "JobStatus", "Problem"} <= set(document["components"]["schemas"])
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]


async def test_the_gateway_announces_itself_and_says_goodbye(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        async with asyncio.timeout(10):
            await gateway.nodes.heard.wait()
        (node, *_) = gateway.nodes.heartbeats
        assert (node.name, node.role) == ("gateway-1", common_pb2.ROLE_GATEWAY)
        assert f"http://{node.address}" == gateway.url
        ready = json.loads((gateway.folder / "ready.json").read_text())
        assert (ready["service"], ready["name"], ready["url"]) == ("gateway", "gateway-1", gateway.url)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['metrics_port']}") as operators:
            assert (await operators.get("/readyz")).status_code == 200
            assert "cortex_gateway_requests_total" in (await operators.get("/metrics")).text
    assert stopped_gateway.nodes.left == ["gateway-1"]


async def test_https_when_a_certificate_is_given(stopped_gateway, authority):
    tls = stopped_gateway.tls_of(Role.GATEWAY)
    async with stopped_gateway.running(http_certificate=tls.certificate, http_key=tls.key) as gateway:
        assert gateway.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(authority.ca))
        async with httpx.AsyncClient(base_url=gateway.url, verify=trust) as client:
            assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("newest", "ciphers", "version"),
    [
        (ssl.TLSVersion.TLSv1_3, "DEFAULT", "TLSv1.3"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM", "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AES+SHA1", None),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", None),
    ],
)
async def test_https_takes_tls_1_2_with_good_ciphers_and_nothing_older(
    stopped_gateway, authority, newest, ciphers, version
):
    tls = stopped_gateway.tls_of(Role.GATEWAY)
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_ciphers(ciphers)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
    async with stopped_gateway.running(http_certificate=tls.certificate, http_key=tls.key) as gateway:
        port = httpx.URL(gateway.url).port
        if version is None:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=context)
            return
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        assert writer.get_extra_info("ssl_object").version() == version
        writer.close()


async def test_a_port_in_use_is_one_clear_error(stopped_gateway):
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    with pytest.raises(PreconditionError, match=f"cannot listen at 127.0.0.1:{port}"):
        async with stopped_gateway.running(port=port):
            pass
    listener.close()


async def test_https_files_that_cannot_be_used_are_one_clear_error(stopped_gateway, tmp_path):
    (tmp_path / "x").write_text("no certificate")
    with pytest.raises(PreconditionError, match="HTTPS certificate"):
        async with stopped_gateway.running(http_certificate=tmp_path / "x", http_key=tmp_path / "x"):
            pass


async def test_settings_that_do_not_fit_together_are_refused(tmp_path):
    config = tmp_path / "gateway.yaml"
    config.write_text(
        "{name: g, state_dir: ., ca: a, certificate: b, key: c, coordinator: 'h:1', discovery: nowhere, http_key: k}"
    )
    with pytest.raises(InvalidArgumentError, match="discovery"):
        load_settings(GatewaySettings, config, "gateway", {})
    config.write_text(config.read_text().replace("nowhere", "h:2"))
    with pytest.raises(InvalidArgumentError, match="both"):
        load_settings(GatewaySettings, config, "gateway", {})
