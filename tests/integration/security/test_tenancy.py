"""Nobody meets a job of another organisation: every call and every path that names a job, through the real gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio

from cortex_common.data import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import BYTES
from cortex_common.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)
from cortex_common.identity import Role
from cortex_common.job.parse import parse_job
from cortex_common.job.wire import spec_to_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from cortex_common.security.shards import seal_dataset
from cortex_common.security.signing import SigningKey
from tests.integration.security.conftest import Guarded

pytestmark = pytest.mark.asyncio(loop_scope="module")
JOB = {
    "model": {"input_dim": 64, "output_dim": 10},
    "data": {"train": "digits", "test": "digits-test"},
    "training": {"rounds": 1},
    "placement": {"workers": 2},
}
SERVICE = pb.DESCRIPTOR.services_by_name["JobService"]
ABOUT_A_JOB = sorted(method.name for method in SERVICE.methods if "job_id" in method.input_type.fields_by_name)
ALICE = (("cortex-principal", "alice"), ("cortex-org", "acme"))
ALICE_ELSEWHERE = (("cortex-principal", "alice"), ("cortex-org", "other"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(guarded: Guarded) -> AsyncIterator[grpc.aio.Channel]:
    """A gateway's connection to the coordinator."""
    address = guarded.servers[Role.COORDINATOR]
    async with open_channel(address, guarded.certificate(Role.GATEWAY), Role.COORDINATOR) as channel:
        yield channel


async def ask(channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...] = (), **fields: object):
    """One call; the first message of a stream."""
    request = getattr(pb, f"{method}Request")(**fields)
    with calling("coordinator"):
        made = getattr(coordinator_pb2_grpc.JobServiceStub(channel), method)(request, metadata=metadata, timeout=10)
        if not hasattr(made, "read"):
            return await made
        async for answer in made:
            made.cancel()
            return answer
        return None


async def submitted(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = (), request_id: str = "") -> str:
    job = spec_to_proto(parse_job(JOB))
    return (await ask(channel, "SubmitJob", metadata, job=job, request_id=request_id)).job_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def job_id(gateway: grpc.aio.Channel) -> str:
    """Alice's job, of the organisation acme."""
    return await submitted(gateway, ALICE)


async def test_most_of_the_service_is_about_a_job() -> None:
    assert len(ABOUT_A_JOB) >= 8


@pytest.mark.parametrize("method", ABOUT_A_JOB)
async def test_a_job_of_another_organisation_does_not_exist(
    gateway: grpc.aio.Channel, job_id: str, method: str
) -> None:
    for stranger in (ALICE_ELSEWHERE, (("cortex-principal", "bob"), ("cortex-org", "default"))):
        with pytest.raises(NotFoundError, match=f"no job '{job_id}'"):
            await ask(gateway, method, stranger, job_id=job_id)
    with pytest.raises(ForbiddenError, match="does not say for whom it asks"):
        await ask(gateway, method, job_id=job_id)


@pytest.mark.parametrize("method", ABOUT_A_JOB)
async def test_its_own_organisation_and_operators_may_steer_a_job(guarded: Guarded, method: str) -> None:
    address = guarded.servers[Role.COORDINATOR]
    for role, metadata in ((Role.GATEWAY, ALICE), (Role.OPERATOR, ())):
        async with open_channel(address, guarded.certificate(role), Role.COORDINATOR) as channel:
            job_id = await submitted(channel, metadata)
            colleague = metadata and (("cortex-principal", "carol"), ("cortex-org", "acme"))
            said = ""
            try:
                await ask(channel, method, colleague, job_id=job_id)
            except (NotFoundError, PreconditionError) as error:
                said = error.message
            assert said == "" or "has not any version" in said or "allowed: paused" in said


async def test_a_list_holds_the_jobs_of_the_organisation_only(gateway: grpc.aio.Channel, job_id: str) -> None:
    everybody = (*ALICE_ELSEWHERE, ("cortex-reach", "all"))
    assert job_id in {job.job_id for job in (await ask(gateway, "ListJobs", ALICE)).jobs}
    assert job_id in {job.job_id for job in (await ask(gateway, "ListJobs", everybody)).jobs}
    assert list((await ask(gateway, "ListJobs", ALICE_ELSEWHERE)).jobs) == []


async def test_a_sealed_data_set_of_another_organisation_does_not_exist(
    guarded: Guarded, gateway: grpc.aio.Channel, tmp_path: Path
) -> None:
    data = Dataset(DatasetInfo("any", (64,), 10, 10), np.zeros((10, 64), np.uint8), np.arange(10), BYTES)
    owner = SigningKey.create(tmp_path / "ann.key")
    halves = np.array_split(np.arange(10), 2)
    told, key = seal_dataset("ward", data, halves, owner, tmp_path / "ward", datetime.now(UTC))
    address = guarded.servers[Role.COORDINATOR]
    async with open_channel(address, guarded.certificate(Role.OPERATOR), Role.COORDINATOR) as operator:
        added = pb.AddDatasetRequest(manifest=told.envelope.to_json(), key=key.key, org="acme")
        await coordinator_pb2_grpc.DatasetServiceStub(operator).AddDataset(added)
    digest = told.reference.rpartition("@")[2]

    async def refusal(metadata: tuple[tuple[str, str], ...], reference: str) -> str:
        job = spec_to_proto(parse_job(JOB | {"data": {"train": reference, "test": "digits-test"}}))
        with pytest.raises(InvalidArgumentError) as caught:
            await ask(gateway, "SubmitJob", metadata, job=job)
        return caught.value.message

    unknown = f"{told.reference.rpartition('@')[0]}@{'0' * len(digest)}"
    for stranger in (ALICE_ELSEWHERE, (("cortex-principal", "bob"), ("cortex-org", "default"))):
        said = await refusal(stranger, unknown)
        assert unknown in said
        assert await refusal(stranger, told.reference) == said.replace(unknown, told.reference)
    job = spec_to_proto(parse_job(JOB | {"data": {"train": told.reference, "test": "digits-test"}}))
    assert (await ask(gateway, "SubmitJob", ALICE, job=job)).job_id


async def test_a_request_id_is_a_persons_own(gateway: grpc.aio.Channel) -> None:
    first = await submitted(gateway, ALICE, "r1")
    assert await submitted(gateway, ALICE, "r1") == first
    assert await submitted(gateway, ALICE_ELSEWHERE, "r1") != first
    other = spec_to_proto(parse_job(JOB | {"training": {"rounds": 2}}))
    with pytest.raises(AlreadyExistsError, match="'r1' was used for another job"):
        await ask(gateway, "SubmitJob", ALICE, job=other, request_id="r1")


# --- the same over HTTP -----------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(guarded: Guarded) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=guarded.http, timeout=10) as client:
        yield client


def bearer(guarded: Guarded, *scopes: str, org: str = "acme", life: timedelta | None = None) -> dict[str, str]:
    token = guarded.tokens.create("alice", scopes, life, org)
    return {"Authorization": f"Bearer {token}"}


async def paths(http: httpx.AsyncClient, job_id: str) -> list[tuple[str, str, bool]]:
    """Method and path of everything that needs a token, and whether it is about a job."""
    described = (await http.get("/openapi.json")).json()["paths"]
    found = [
        (method.upper(), path.replace("{job_id}", job_id), "{job_id}" in path)
        for path, methods in described.items()
        for method, operation in methods.items()
        if operation.get("security")
    ]
    assert sum(about for _, _, about in found) >= 7
    return found


async def status(http: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Of the answer's beginning: some never end."""
    async with http.stream(method, path, headers=headers) as answer:
        detail = ""
        if answer.status_code >= 400:
            await answer.aread()
            detail = answer.json()["detail"]
        return answer.status_code, detail


async def test_without_a_good_token_nothing_is_answered(guarded: Guarded, http: httpx.AsyncClient, job_id: str) -> None:
    revoked = bearer(guarded, "admin")
    guarded.tokens.revoke(revoked["Authorization"].split("_")[1])
    expired = bearer(guarded, "admin", life=timedelta(microseconds=1))
    unknown = bearer(guarded, "admin")["Authorization"][:-1] + "!"
    bad = [{}, revoked, expired, {"Authorization": unknown}, {"Authorization": "Bearer junk"}]
    for method, path, _ in await paths(http, job_id):
        for headers in bad:
            code, detail = await status(http, method, path, headers)
            assert (code, "token" in detail) == (401, True), (method, path, headers, detail)


async def test_every_path_needs_the_scope_it_documents(guarded: Guarded, http: httpx.AsyncClient, job_id: str) -> None:
    reader, submitter = bearer(guarded, "read"), bearer(guarded, "submit")
    for method, path, _ in await paths(http, job_id):
        for headers, allowed in ((reader, method == "GET"), (submitter, method != "GET")):
            refused = (await status(http, method, path, headers))[0] == 403
            assert refused != allowed, (method, path)


async def test_over_http_a_job_of_another_organisation_does_not_exist(
    guarded: Guarded, http: httpx.AsyncClient, job_id: str
) -> None:
    own = bearer(guarded, "read", "submit")
    stranger = bearer(guarded, "read", "submit", org="other")
    admin = bearer(guarded, "admin", org="other")
    for method, path, is_about_a_job in await paths(http, job_id):
        if not is_about_a_job:
            continue
        code, detail = await status(http, method, path, stranger)
        assert (code, detail) == (404, f"no job '{job_id}'"), (method, path)
        for headers in (own, admin):
            assert (await status(http, method, path, headers))[1] != f"no job '{job_id}'", (method, path)
    assert job_id not in (await http.get("/api/v1/jobs", headers=stranger)).text
    assert job_id in (await http.get("/api/v1/jobs", headers=own)).text
