"""Regional topology: each region's aggregator reduces its own workers and is a worker to the root."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.pb.v1 import coordinator_pb2 as pb
from tests.integration.coordinator.harness import LARGE, ScriptedWorker, Site, hold_at, let_go, site, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until

VALUES = {"w1": 1.0, "w2": 2.5, "w3": -3.25, "w4": 0.1}


@pytest.fixture
async def cortex(tls_of, tmp_path):
    async with site(tls_of, tmp_path) as made:
        await made.start("aggregator-us", "us")
        yield made


def workers(cortex: Site) -> list[ScriptedWorker]:
    regions = {"w1": "eu", "w2": "us", "w3": "eu", "w4": "us"}
    return [ScriptedWorker(cortex, name, value, regions[name]) for name, value in VALUES.items()]


async def train(
    cortex: Site, topology: str, rounds: int = 3, crew: list[ScriptedWorker] | None = None, **sections: Any
) -> tuple[JobStatus, dict[str, np.ndarray]]:
    await announce(cortex, *VALUES)
    async with working(*(crew or workers(cortex))), cortex.jobs() as stub:
        where = {"placement": {"workers": 4}, "aggregation": {"topology": topology}}
        spec = job(training={"rounds": rounds}, **where, **sections)
        job_id = await submit(stub, spec)
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        answers = [answer async for answer in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id))]
    return status, load_safetensors(b"".join(answer.data for answer in answers))


async def test_regional_gives_what_flat_gives_and_fewer_bytes_cross_regions(cortex):
    flat, flat_model = await train(cortex, "flat")
    regional, regional_model = await train(cortex, "regional")
    first = {report.round: report for report in flat.history}
    for report in regional.history:
        assert report.accepted == 4
        # Two workers are in the other region: for each of them an update and a version cross, or for both together.
        # Version 0 comes before anything is counted.
        crossed = first[report.round].bytes_between_regions
        assert crossed == (2 if report.round > 1 else 1) * report.bytes_between_regions > 0
        assert report.bytes_up == first[report.round].bytes_up
    # Which worker made the first version may differ between the jobs; what three rounds added may not.
    mean = np.mean(list(VALUES.values()))
    for model in (flat_model, regional_model):
        first_value = min(VALUES.values(), key=lambda value: abs(model["w"][0, 0] - value - 3 * mean))
        np.testing.assert_allclose(model["w"], np.full((4, 3), first_value + 3 * mean), rtol=1e-6)


async def test_a_region_whose_aggregator_is_gone_is_served_by_another(cortex):
    await announce(cortex, *VALUES)
    crew = workers(cortex)
    async with working(*crew), cortex.jobs() as stub:
        spec = job(training={"rounds": 20}, placement={"workers": 4}, aggregation={"topology": "regional"})
        hold_at(3, crew[0])
        job_id = await submit(stub, spec)
        await until(stub, job_id, JobPhase.TRAINING, round_number=3)
        await cortex.stop("aggregator-us")
        let_go(crew[0])
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        assert [report.accepted for report in status.history] == [4] * 20
        events = [e.event.name async for e in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))]
    assert "region_moved" in events


async def test_versions_cross_regions_as_deltas_once_a_region(cortex):
    regions = {"w1": "eu", "w2": "us", "w3": "eu", "w4": "us"}
    crew = [ScriptedWorker(cortex, name, value, regions[name], manifest=LARGE) for name, value in VALUES.items()]
    sections = {"compression": {"download": {"codec": "int8", "resync_every": 3}}}
    status, model = await train(cortex, "regional", 5, crew, **sections)
    for worker in crew:
        assert {(number, kind) for number, kind, _ in worker.pulled} == {
            (1, "model"), (2, "delta"), (3, "model"), (4, "delta"), (5, "model")
        }  # fmt: skip
    crossed = {report.round: report.bytes_between_regions for report in status.history}
    update = 4 * LARGE.elements
    # In round 1 version 0 came down, in round 2 version 1, and so on: each is fetched to be evaluated.
    assert [crossed[number] for number in (1, 2, 4)] == pytest.approx([2 * update] * 3, rel=0.01)
    assert crossed[3] == pytest.approx(crossed[5], rel=0.01)
    assert crossed[3] < 1.3 * update
    # The last version is exact, whatever the deltas on the way left out.
    mean = np.mean(list(VALUES.values()))
    first_value = min(VALUES.values(), key=lambda value: abs(model["w"][0, 0] - value - 5 * mean))
    np.testing.assert_allclose(model["w"], np.full((500, 600), first_value + 5 * mean), rtol=1e-5)
