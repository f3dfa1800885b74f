"""/api/v1/jobs: every endpoint, each class of error, what is passed on and what comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import AsyncExitStack

import httpx
import pytest

from cortex_common import errors
from cortex_common.errors import InvalidArgumentError, Violation
from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(MODEL).hexdigest()
JOB = {
    "name": "digits",
    "model": {"kind": "mlp", "input_dim": 64, "hidden_dims": [32], "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test"},
    "training": {"optimizer": "adam", "rounds": 2},
    "placement": {"workers": 2, "min_workers": 1},
}
YAML = "name: digits\nmodel: {kind: mlp, input_dim: 64, hidden_dims: [32], output_dim: 10}\n" + (
    "data: {train: digits, test: digits-test}\ntraining: {optimizer: adam, rounds: 2}\n"
    "placement: {workers: 2, min_workers: 1}\n"
)
SUBMIT = "/api/v1/jobs/submit"


def problem(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert set(found) == {"type", "title", "status", "detail", "errors"}
    assert found["status"] == status
    assert "Traceback" not in response.text
    return found


async def test_a_job_is_submitted_as_json(gateway):
    response = await gateway.http.post(SUBMIT, json=JOB, headers={"Idempotency-Key": "key-1"})
    assert response.status_code == 201
    body = response.json()
    assert (body["job_id"], body["status"]) == ("job-1", "submitted")
    assert body["links"]["status"] == "/api/v1/jobs/job-1/status" == response.headers["location"]
    ((spec, request_id),) = gateway.jobs.submitted
    assert (list(spec.model.hidden_dims), spec.training.rounds, request_id) == ([32], 2, "key-1")
    assert gateway.jobs.principals == ["alice"]


@pytest.mark.parametrize("media_type", ["application/yaml", "text/yaml", "application/x-yaml; charset=utf-8"])
async def test_the_same_job_is_submitted_as_yaml(gateway, media_type):
    response = await gateway.http.post(SUBMIT, content=YAML, headers={"Content-Type": media_type})
    assert response.status_code == 201
    await gateway.http.post(SUBMIT, json=JOB)
    (as_yaml, no_key), (as_json, _) = gateway.jobs.submitted
    assert as_yaml == as_json
    assert no_key == ""


async def test_a_job_with_mistakes_is_answered_with_all_of_them(gateway):
    job = JOB | {"nmae": "x", "training": {"optimizer": "adam", "rounds": -1, "batch_size": "many"}}
    found = problem(await gateway.http.post(SUBMIT, json=job), 422)
    assert {each["path"] for each in found["errors"]} == {"nmae", "training.rounds", "training.batch_size"}
    assert "did you mean 'name'" in str(found["errors"])
    assert gateway.jobs.submitted == []


async def test_mistakes_only_the_coordinator_sees_are_told_alike(gateway):
    violation = Violation("data.train", "'cifar' given; allowed: digits, fashion-mnist")
    gateway.jobs.error = InvalidArgumentError.of("job", [violation])
    found = problem(await gateway.http.post(SUBMIT, json=JOB), 422)
    assert found["errors"] == [{"path": "data.train", "message": "'cifar' given; allowed: digits, fashion-mnist"}]


@pytest.mark.parametrize(
    ("content", "media_type", "status", "complaint"),
    [
        (b'{"name": ', "application/json", 400, "not JSON"),
        (b"", "application/json", 400, "empty"),
        (b"[1, 2]", "application/json", 400, "a list given; allowed: a mapping"),
        (b'{"a": 1, "a": 2}', "application/json", 400, "twice"),
        (b"\xff\xfe", "application/json", 400, "not UTF-8"),
        (b"name: [", "application/yaml", 400, "not YAML"),
        (b"a: &a [1]\nb: *a\n", "application/yaml", 400, "aliases"),
        (b"name=x", "application/x-www-form-urlencoded", 415, "allowed: application/json, application/yaml"),
        (b"x" * (1 << 20 | 1), "application/json", 413, "allowed: up to 1048576 bytes"),
    ],
)
async def test_a_body_that_is_no_job_file_is_refused(gateway, content, media_type, status, complaint):
    response = await gateway.http.post(SUBMIT, content=content, headers={"Content-Type": media_type})
    assert complaint in problem(response, status)["detail"]
    assert gateway.jobs.calls == []


async def test_a_body_of_undeclared_length_is_capped_while_it_arrives(gateway):
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {SUBMIT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n".encode())
    writer.write(b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(17):
        writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")  # 64 KiB each, no last chunk
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"more given; allowed: up to 1048576 bytes" in answer


@pytest.mark.parametrize("key", ["two words", "x" * 201])
async def test_an_idempotency_key_has_limits(gateway, key):
    found = problem(await gateway.http.post(SUBMIT, json=JOB, headers={"Idempotency-Key": key}), 422)
    assert found["errors"][0]["path"] == "header.idempotency-key"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidArgumentError("bad"), 400),
        (errors.ForbiddenError("not yours"), 403),
        (errors.NotFoundError("no such job"), 404),
        (errors.AlreadyExistsError("used for another job"), 409),
        (errors.PreconditionError("has ended"), 409),
        (errors.ConflictError("stale"), 409),
        (errors.OverloadedError("full"), 429),
        (errors.UnavailableError("database is away"), 503),
        (errors.CorruptError("digest differs"), 500),
        (errors.UnauthenticatedError("certificate expired"), 503),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_each_error_of_the_coordinator_has_its_status(gateway, error, status):
    gateway.jobs.error = error
    found = problem(await gateway.http.get("/api/v1/jobs/job-1/status"), status)
    assert error.message in found["detail"]


async def test_a_bug_of_the_coordinator_is_an_internal_error_without_its_cause(gateway):
    gateway.jobs.status = None  # the fake stumbles over it
    found = problem(await gateway.http.get("/api/v1/jobs/job-1/status"), 500)
    assert found["detail"] == "internal error"


async def test_without_the_coordinator_requests_are_503_with_advice(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        await gateway.stop_peer(Role.COORDINATOR)
        response = await gateway.http.get("/api/v1/jobs")
        assert "coordinator at 127.0.0.1:" in problem(response, 503)["detail"]
        assert response.headers["retry-after"] == "1"


async def test_status_is_the_object_people_rely_on(gateway):
    status = (await gateway.http.get("/api/v1/jobs/job-1/status")).json()
    assert list(status)[:13] == [
        "job_id",
        "name",
        "status",
        "round",
        "rounds",
        "waiting_for",
        "metrics",
        "history",
        "model",
        "goodput",
        "privacy",
        "error",
        "submitted_at",
    ]
    assert status["history"][0]["test_accuracy"] == 0.8
    assert status["metrics"] == {"train_loss": None, "test_accuracy": 0.842}  # JSON has no NaN
    assert status["model"] == {"round": 1, "sha256": "ab", "parameters": 10}
    assert (status["submitted_at"], status["finished_at"]) == ("2026-01-01T12:00:00Z", None)


async def test_an_unknown_job_is_404_everywhere(gateway):
    for path in ("status", "versions", "model", "events"):
        assert "nope" in problem(await gateway.http.get(f"/api/v1/jobs/nope/{path}"), 404)["detail"]
    for path in ("cancel", "pause", "resume"):
        problem(await gateway.http.post(f"/api/v1/jobs/nope/{path}"), 404)


async def test_jobs_are_listed_up_to_a_limit(gateway):
    assert len((await gateway.http.get("/api/v1/jobs")).json()["jobs"]) == 3
    assert len((await gateway.http.get("/api/v1/jobs?limit=2")).json()["jobs"]) == 2
    found = problem(await gateway.http.get("/api/v1/jobs?limit=0"), 422)
    assert found["errors"][0]["path"] == "query.limit"


@pytest.mark.parametrize(
    ("action", "rpc", "status"),
    [("cancel", "CancelJob", "cancelled"), ("pause", "PauseJob", "paused"), ("resume", "ResumeJob", "training")],
)
async def test_a_job_is_steered(gateway, action, rpc, status):
    response = await gateway.http.post(f"/api/v1/jobs/job-1/{action}")
    assert (response.status_code, response.json()["status"]) == (200, status)
    assert gateway.jobs.calls == [rpc, "GetJob"]
    assert set(gateway.jobs.principals) == {"alice"}


async def test_versions_are_listed(gateway):
    versions = (await gateway.http.get("/api/v1/jobs/job-1/versions")).json()["versions"]
    assert [(each["round"], each["sha256"], each["metrics"]) for each in versions] == [
        (1, SHA256, {"test_accuracy": 0.9}),
        (2, SHA256, {"test_accuracy": 0.9}),
    ]


async def test_the_model_is_downloaded_byte_for_byte(gateway):
    response = await gateway.http.get("/api/v1/jobs/job-1/model")
    assert response.status_code == 200
    assert response.content == MODEL
    headers = response.headers
    assert headers["content-disposition"] == 'attachment; filename="job-1-round-2.safetensors"'
    assert (headers["etag"], headers["x-model-sha256"], headers["x-model-round"]) == (f'"{SHA256}"', SHA256, "2")
    assert headers["content-length"] == str(len(MODEL))


async def test_a_model_already_held_is_not_sent_again(gateway):
    response = await gateway.http.get("/api/v1/jobs/job-1/model", headers={"If-None-Match": f'"{SHA256}"'})
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", f'"{SHA256}"')


async def test_a_round_that_is_not_kept_is_404(gateway):
    assert (await gateway.http.get("/api/v1/jobs/job-1/model?round=2")).status_code == 200
    assert "kept are" in problem(await gateway.http.get("/api/v1/jobs/job-1/model?round=1"), 404)["detail"]
    problem(await gateway.http.get("/api/v1/jobs/job-1/model?round=-1"), 422)


@pytest.mark.parametrize("damage", ["break", "corrupt", "short"])
async def test_a_download_that_goes_wrong_never_looks_complete(gateway, damage):
    if damage == "break":
        gateway.jobs.break_after = 2
    else:
        gateway.jobs.model = MODEL[:-1] + (b"\x00" if damage == "corrupt" else b"")
    with pytest.raises(httpx.RemoteProtocolError):
        await gateway.http.get("/api/v1/jobs/job-1/model")


def sse(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["event"], json.loads(fields["data"])))
    return found


async def test_status_events_end_with_the_job(gateway):
    running = gateway.jobs.status
    gateway.jobs.watched = [running, running.model_copy(update={"status": JobPhase.COMPLETED})]
    response = await gateway.http.get("/api/v1/jobs/job-1/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = sse(response.text)
    assert [(name, data.get("status")) for name, data in events] == [
        ("status", "training"),
        ("status", "completed"),
        ("end", None),
    ]


async def test_log_events_go_on_after_the_last_one_seen(gateway):
    path = "/api/v1/jobs/job-1/events?kind=events"
    events = sse((await gateway.http.get(f"{path}&follow=false")).text)
    assert [data.get("sequence") for _, data in events] == [1, 2, 3, None]
    events = sse((await gateway.http.get(f"{path}&follow=true&after=2")).text)
    assert [(name, data.get("name")) for name, data in events] == [
        ("event", "round_closed"),
        ("event", "job_completed"),
        ("end", None),
    ]
    events = sse((await gateway.http.get(f"{path}&follow=false", headers={"Last-Event-ID": "3"})).text)
    assert [name for name, _ in events] == ["end"]


async def test_a_reader_who_goes_away_ends_the_watch(gateway):
    gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True
    async with gateway.http.stream("GET", "/api/v1/jobs/job-1/events") as response:
        await anext(response.aiter_lines())
        assert gateway.jobs.watching == 1
    async with asyncio.timeout(10):
        await gateway.jobs.unwatched.wait()


async def test_the_coordinators_end_is_told_in_the_stream(stopped_gateway):
    async with stopped_gateway.running(watch_patience_s=0.0) as gateway:
        gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True
        async with gateway.http.stream("GET", "/api/v1/jobs/job-1/events") as response:
            lines = response.aiter_lines()
            await anext(lines)
            await gateway.stop_peer(Role.COORDINATOR)
            rest = [line async for line in lines]
        assert "event: problem" in rest


async def test_log_events_outlive_the_connection_to_the_coordinator(stopped_gateway):
    stopped_gateway.rpc = {"connection_life_s": 0.5, "connection_grace_s": 0.1}
    async with stopped_gateway.running() as gateway:
        jobs = gateway.jobs
        jobs.log_length = 2
        async with (
            asyncio.timeout(20),
            gateway.http.stream("GET", "/api/v1/jobs/job-1/events?kind=events") as response,
        ):
            lines = (line async for line in response.aiter_lines() if line.startswith(("id: ", "event: ")))
            assert [await anext(lines) for _ in range(4)] == ["id: 1", "event: event", "id: 2", "event: event"]
            await eventually(lambda: len(jobs.events_after) >= 3)
            jobs.log_length = 3
            jobs.grown.set()
            assert [await anext(lines) for _ in range(2)] == ["id: 3", "event: event"]
            jobs.log_length = None
            jobs.grown.set()
            assert [line async for line in lines] == ["id: 99", "event: event", "event: end"]
        assert jobs.events_after[:3] == [0, 2, 2]


async def test_status_events_outlive_the_connection_and_tell_no_status_twice(stopped_gateway):
    stopped_gateway.rpc = {"connection_life_s": 0.5, "connection_grace_s": 0.1}
    async with stopped_gateway.running() as gateway:
        running = gateway.jobs.status
        gateway.jobs.watched, gateway.jobs.endless = [running], True
        async with asyncio.timeout(20), gateway.http.stream("GET", "/api/v1/jobs/job-1/events") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: status"
            await eventually(lambda: gateway.jobs.calls.count("WatchJob") >= 3)
            gateway.jobs.watched = [running.model_copy(update={"status": JobPhase.COMPLETED})]
            gateway.jobs.endless = False
            rest = [line async for line in lines if line.startswith("event: ")]
        assert rest == ["event: status", "event: end"]


async def test_streams_end_when_the_gateway_stops(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True
        async with gateway.http.stream("GET", "/api/v1/jobs/job-1/events") as response:
            lines = response.aiter_lines()
            await anext(lines)
            gateway.stop.set()
            rest = [line async for line in lines]
        assert not any(line.startswith("event: ") for line in rest)


async def test_more_event_streams_than_allowed_are_refused(stopped_gateway):
    async with stopped_gateway.running(max_event_streams=1) as gateway:
        gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True
        async with gateway.http.stream("GET", "/api/v1/jobs/job-1/events") as response:
            await anext(response.aiter_lines())
            response = await gateway.http.get("/api/v1/jobs/job-1/events")
            assert "allows 1" in problem(response, 429)["detail"]
            assert response.headers["retry-after"] == "5"


async def test_streams_asked_for_at_the_same_time_are_counted_before_they_begin(stopped_gateway):
    async with stopped_gateway.running(max_event_streams=2) as gateway, AsyncExitStack() as opened:
        gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True

        async def ask() -> int:
            stream = gateway.http.stream("GET", "/api/v1/jobs/job-1/events")
            return (await opened.enter_async_context(stream)).status_code

        assert sorted(await asyncio.gather(*(ask() for _ in range(6)))) == [200, 200, 429, 429, 429, 429]


async def test_a_stream_ends_soon_after_its_token_was_revoked(stopped_gateway):
    async with stopped_gateway.running() as gateway:
        gateway.jobs.watched, gateway.jobs.endless = [gateway.jobs.status], True
        leaked = gateway.bearer("read", name="leaked")
        path = "/api/v1/jobs/job-1/events"
        async with asyncio.timeout(40), gateway.http.stream("GET", path, headers=leaked, timeout=40) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: status"
            gateway.tokens.revoke(leaked["Authorization"].split("_")[1])
            rest = [line async for line in lines if line.startswith(("event: ", "data: "))]
        assert rest[-2] == "event: problem"
        assert json.loads(rest[-1].removeprefix("data: "))["detail"] == "token 'leaked' was revoked"
