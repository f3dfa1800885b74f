"""How often somebody may ask, and what is written down about who asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cortex_common.clock import SystemClock
from cortex_common.security.audit import AuditLog, Entry, read_log
from cortex_common.security.audit_check import check_log
from cortex_common.security.audit_proof import SEEN_HEAD, Trust, prove_log, prove_token_log
from cortex_common.security.authority import Authority
from cortex_common.telemetry.metrics import REGISTRY
from tests.integration.gateway.conftest import Gateway
from tests.waiting import eventually


def throttled(what: str) -> float:
    return REGISTRY.get_sample_value("cortex_gateway_throttled_total", {"what": what}) or 0.0


async def test_a_principal_that_asks_too_often_is_told_when_to_come_back(stopped_gateway: Gateway) -> None:
    async with stopped_gateway.running(requests_per_s=0.5, requests_burst=5) as gateway:
        before, other = throttled("principal"), gateway.bearer("read")
        answers = await asyncio.gather(*(gateway.http.get("/api/v1/network/status") for _ in range(12)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 5 + [429] * 7
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
        assert "asks too often; allowed: 0.5 requests a second, 5 at once" in refused.json()["detail"]
        assert throttled("principal") == before + 7
        assert (await gateway.http.get("/api/v1/network/status", headers=other)).status_code == 200, "others are not"
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_guessing_tokens_is_slowed_down_and_good_ones_are_not(stopped_gateway: Gateway) -> None:
    async with stopped_gateway.running(bad_tokens_per_s=0.01, bad_tokens_burst=3) as gateway:
        guess = {"Authorization": "Bearer ctx_0123456789ab_guess"}
        codes = [(await gateway.http.get("/api/v1/jobs", headers=guess)).status_code for _ in range(5)]
        assert codes == [401, 401, 401, 429, 429]
        assert (await gateway.http.get("/api/v1/jobs")).status_code == 200, "good tokens come from there too"


async def test_refusals_and_last_use_are_written_down(stopped_gateway: Gateway) -> None:
    async with stopped_gateway.running() as gateway:
        expired = gateway.bearer("read", name="late", life=timedelta(microseconds=1))
        for headers in ({"Authorization": "Bearer junk"}, expired, gateway.bearer("read", name="reader")):
            await gateway.http.post("/api/v1/jobs/job-9/cancel", headers=headers)
        await gateway.http.get("/api/v1/jobs")
        log = gateway.folder / "gateway" / "audit"
        await eventually(lambda: len(_refusals(log)) >= 2, 30)
    records = _refusals(log)
    assert {record["what"] for record in records} == {"POST /api/v1/jobs/{job_id}/cancel"}
    assert {record.get("who", "") for record in records} == {"", "default/reader"}
    assert all("job_id=job-9" in record["about"] for record in records)
    assert check_log(log).problems == []
    kept = (gateway.folder / "gateway" / "tokens.json.used").read_text()
    assert gateway.token.split("_")[1] in kept


def _refusals(log: Path) -> list[Mapping[str, Any]]:
    return [record for record in read_log(log) if record["decision"] == "refused"]


async def test_heads_of_the_log_of_tokens_are_in_the_gateways_own(
    stopped_gateway: Gateway, authority: Authority
) -> None:
    async with stopped_gateway.running() as gateway:
        log, tokens = gateway.folder / "gateway" / "audit", gateway.folder / "gateway" / "tokens.json.audit"
        await eventually(lambda: any(record["what"] == SEEN_HEAD for record in read_log(log)), 30)
    trust = Trust(authority.bundle, lambda *_: False, SystemClock().wall_s())
    proof = prove_log(log, None, trust)
    assert proof.problems == proof.unproven == []
    assert prove_token_log(tokens, [proof], trust).problems == []
    [segment] = tokens.glob("audit-*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b"scopes=", b"scope5=", 1))
    assert prove_token_log(tokens, [proof], trust).problems == ["record 1 was changed"]
    segment.write_bytes(b"")
    AuditLog(tokens).append(Entry("uid:0", "token create", "allowed", "OK", about="token_id=other"), 1e9)
    last = proof.token_heads[-1].number
    found = "is not the one whose hash was signed" if last == 1 else "was signed and is gone"
    assert f"record {last} {found}" in prove_token_log(tokens, [proof], trust).problems
