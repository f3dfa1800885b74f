"""Regional topology: each region's aggregator reduces its own workers and is a worker to the root."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.tensors import Manifest
from tests.integration.coordinator.harness import LARGE, MANIFEST, ScriptedWorker, Site, hold_at, let_go, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("two_regions")

VALUES = {"w1": 1.0, "w2": 2.5, "w3": -3.25, "w4": 0.1}


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


async def test_a_round_goes_on_without_the_only_worker_of_a_region(cortex):
    await announce(cortex, *VALUES)
    lone, *others = (
        ScriptedWorker(cortex, name, VALUES[name], "us" if name == "w2" else "eu") for name in ("w2", "w1", "w3", "w4")
    )
    async with working(*others), cortex.jobs() as stub:
        async with working(lone):
            hold_at(2, lone, others[0])
            placement = {"workers": 4, "min_workers": 3}
            spec = job(training={"rounds": 3}, placement=placement, aggregation={"topology": "regional"})
            job_id = await submit(stub, spec)
            await eventually(lambda: not lone.idle.is_set() and not others[0].idle.is_set())
        async for answer in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id, follow=True)):
            if answer.event.name == "seat_dropped":
                break
        let_go(others[0])
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
    assert status.status is JobPhase.COMPLETED, status.error
    assert [report.accepted for report in status.history] == [4, 3, 3]
    assert [dropped.worker for dropped in status.history[1].dropped] == ["w2"]
    assert [report.attempt for report in status.history] == [1] * 3


class Examiner(ScriptedWorker):
    """Evaluates nothing before it may."""

    def __init__(self, cortex: Site, name: str, value: float, region: str, may: asyncio.Event) -> None:
        super().__init__(cortex, name, value, region)
        self.asked = asyncio.Event()
        self._may = may

    async def _pull(self, assignment: pb.Assignment) -> None:
        self.asked.set()
        await self._may.wait()
        await super()._pull(assignment)


async def test_versions_are_tested_by_others_where_a_region_cannot_have_them(cortex):
    await announce(cortex, *VALUES)
    may = asyncio.Event()
    crew = [
        Examiner(cortex, name, value, "us" if name in ("w2", "w4") else "eu", may) for name, value in VALUES.items()
    ]
    async with working(*crew), cortex.jobs() as stub:
        spec = job(training={"rounds": 1}, placement={"workers": 4}, aggregation={"topology": "regional"})
        job_id = await submit(stub, spec)
        await asyncio.gather(*(each.asked.wait() for each in crew))
        await cortex.stop("aggregator-us")
        may.set()
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
    assert status.status is JobPhase.COMPLETED, status.error
    assert status.metrics["test_accuracy"] == pytest.approx(0.7)
    assert [report.attempt for report in status.history] == [1]


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


INSIDE = {"w1": "eu.paris", "w2": "eu.lyon", "w3": "eu", "w4": "us"}


@pytest.fixture
async def nested(cortex):
    """Beside eu and us an aggregator in each of two regions in eu, and one above all, which becomes the root."""
    for name, region in (("paris", "eu.paris"), ("lyon", "eu.lyon"), ("global", "global")):
        await cortex.start(f"aggregator-{name}", region)
    world = cortex.running.coordinator._network.world
    await eventually(lambda: len(world(frozenset(), ()).aggregators) == 5)
    return cortex


def crew_inside(cortex: Site, manifest: Manifest = MANIFEST) -> list[ScriptedWorker]:
    return [ScriptedWorker(cortex, name, value, INSIDE[name], manifest=manifest) for name, value in VALUES.items()]


def copies(root: Path, job_id: str) -> dict[str, int]:
    """How many versions, or copies of them, each aggregator has of a job."""
    found = {path.name: path / "versions" / job_id for path in root.glob("aggregator*")}
    return {name: len(list(folder.glob("*.json"))) for name, folder in found.items() if folder.exists()}


def check_model(model: dict[str, np.ndarray], rounds: int, shape: tuple[int, int] = (4, 3)) -> None:
    """Each round has added the mean of all updates, each once, to one worker's first version."""
    mean = np.mean(list(VALUES.values()))
    first_value = min(VALUES.values(), key=lambda value: abs(model["w"][0, 0] - value - rounds * mean))
    np.testing.assert_allclose(model["w"], np.full(shape, first_value + rounds * mean), rtol=1e-5)


async def test_regions_in_regions_give_what_flat_gives_and_each_hop_between_them_counts(nested, tmp_path):
    flat, flat_model = await train(nested, "flat", crew=crew_inside(nested))
    regional, regional_model = await train(nested, "regional", crew=crew_inside(nested))
    check_model(flat_model, 3)
    check_model(regional_model, 3)
    assert [report.accepted for report in regional.history] == [4] * 3
    # Flat, the updates of three workers go to eu in round 1, and later each fetches a version besides.
    update = flat.history[0].bytes_between_regions / 3
    assert [report.bytes_between_regions for report in flat.history] == [3 * update, 6 * update, 6 * update]
    # Paris and Lyon send to eu and fetch there, eu and us send to the root: whatever lies below them.
    assert [report.bytes_between_regions for report in regional.history] == [8 * update] * 3
    assert min(copies(tmp_path, regional.job_id).values()) >= 1
    assert len(copies(tmp_path, regional.job_id)) == 5
    await eventually(lambda: not list(tmp_path.glob("aggregator*/spool/*")))


async def test_when_the_aggregator_between_is_gone_its_regions_go_around_it(nested):
    await announce(nested, *VALUES)
    crew = crew_inside(nested)
    async with working(*crew), nested.jobs() as stub:
        spec = job(training={"rounds": 12}, placement={"workers": 4}, aggregation={"topology": "regional"})
        hold_at(3, crew[0])
        job_id = await submit(stub, spec)
        await until(stub, job_id, JobPhase.TRAINING, round_number=3)
        await nested.stop("aggregator")
        let_go(crew[0])
        await until(stub, job_id, JobPhase.TRAINING, round_number=6)
        hold_at(8, crew[3])
        await nested.start("aggregator")
        let_go(crew[3])
        status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
        assert status.status is JobPhase.COMPLETED, status.error
        assert [report.accepted for report in status.history] == [4] * 12
        assert status.history[2].attempt == 2
        events = [e.event.name async for e in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))]
        assert events.count("region_moved") == 1
        answers = [answer async for answer in stub.DownloadModel(pb.DownloadModelRequest(job_id=job_id))]
    check_model(load_safetensors(b"".join(answer.data for answer in answers)), 12)


@pytest.mark.parametrize("service", ["aggregator", "aggregator-paris", "aggregator-global", "coordinator"])
async def test_whoever_starts_again_in_a_round_of_regions_in_regions_the_job_goes_on(nested, service):
    region = {"aggregator-paris": "eu.paris", "aggregator-global": "global"}.get(service, "eu")
    await announce(nested, *VALUES)
    crew = crew_inside(nested)
    async with working(*crew), nested.jobs() as stub:
        hold_at(2, *crew[:2])
        aggregation = {"topology": "regional", "strategy": "fedavgm"}
        deltas = {"download": {"codec": "int8", "resync_every": 3}}
        spec = job(training={"rounds": 4}, placement={"workers": 4}, aggregation=aggregation, compression=deltas)
        job_id = await submit(stub, spec)
        await until(stub, job_id, JobPhase.TRAINING, round_number=2)
        await nested.stop(service)
        await nested.start(service, region)
        let_go(*crew[:2])
        async with nested.jobs() as again:
            status = await until(again, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
    assert status.status is JobPhase.COMPLETED, status.error
    assert [report.accepted for report in status.history] == [4] * 4


async def test_a_root_that_comes_back_elsewhere_after_the_freeze_is_found(nested):
    nested.aggregator_settings = {"forward_patience_s": 0.5}
    for service, region in (("aggregator", "eu"), ("aggregator-us", "us")):
        await nested.stop(service)
        await nested.start(service, region)
    world = nested.running.coordinator._network.world
    await eventually(lambda: [view.is_live for view in world(frozenset(), ()).aggregators.values()] == [True] * 5)
    await announce(nested, *VALUES)
    crew = crew_inside(nested)
    async with working(*crew), nested.jobs() as stub:
        hold_at(2, *crew)
        spec = job(training={"rounds": 3}, placement={"workers": 4}, aggregation={"topology": "regional"})
        job_id = await submit(stub, spec)
        await eventually(lambda: not any(each.idle.is_set() for each in crew))
        await nested.stop("aggregator-global")
        let_go(*crew)
        async with asyncio.timeout(60):
            await until(stub, job_id, JobPhase.AGGREGATING, round_number=2)
            del nested._ports["aggregator-global"]
            await nested.start("aggregator-global", "global")
            status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
    assert status.status is JobPhase.COMPLETED, status.error
    assert [(report.attempt, report.accepted) for report in status.history] == [(1, 4)] * 3


async def test_deltas_go_down_from_region_to_region_once_each(nested):
    crew = crew_inside(nested, LARGE)
    sections = {"compression": {"download": {"codec": "int8", "resync_every": 3}}}
    status, model = await train(nested, "regional", 5, crew, **sections)
    for worker in crew:
        assert {(number, kind) for number, kind, _ in worker.pulled} == {
            (1, "model"), (2, "delta"), (3, "model"), (4, "delta"), (5, "model")
        }  # fmt: skip
    update = 4 * LARGE.elements
    crossed = {report.round: report.bytes_between_regions for report in status.history}
    assert [crossed[number] for number in (1, 2, 4)] == pytest.approx([8 * update] * 3, rel=0.01)
    assert crossed[3] == pytest.approx(crossed[5], rel=0.01)
    assert crossed[3] < 4 * 1.3 * update
    check_model(model, 5, (500, 600))
