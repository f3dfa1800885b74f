"""Who may download a version: workers with a seat of its job. Over gRPC, and through a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from cortex_common.errors import ForbiddenError
from cortex_common.identity import TlsFiles
from cortex_common.ids import JobId
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.security.audit import read_log
from tests.integration.aggregator.harness import JOB, Cluster, arena_of, running_cluster
from tests.integration.aggregator.test_ended_jobs import prune, version_of
from tests.integration.aggregator.test_uploads import way
from tests.integration.aggregator.ways import ThroughGateway
from tests.keys import wrapped

__all__ = ["way"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
OTHER = JobId("job-2")
STRANGER = "w9"


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(
    way: ThroughGateway | None, tls_of: Callable[..., TlsFiles], tmp_path: Path
) -> AsyncIterator[Cluster]:
    """An aggregator at which the stranger has a seat of another job."""
    async with running_cluster(tls_of, tmp_path / "state", way) as running:
        running.readers = ()
        spec = running.spec(0)
        spec.job_id, spec.seats[0].worker = OTHER, STRANGER
        spec.data_key.CopyFrom(wrapped(running.sealing_key, OTHER, running.key))
        await running.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec))
        yield running


async def seat(cluster: Cluster, base: str, *workers: str, attempt: int = 0) -> None:
    """Open round 1 for these workers."""
    spec = cluster.spec(1, base, len(workers), attempt)
    for index, name in enumerate(workers):
        spec.seats[index].worker = name
    await cluster.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec))


async def who_may(cluster: Cluster, sha256: str, *workers: str) -> list[str]:
    """Those of the workers that get the version."""
    served = []
    for name in workers:
        try:
            assert (await cluster.pull(sha256, worker=name)).arena is not None
            served.append(name)
        except ForbiddenError:
            continue
    return served


async def test_a_worker_of_another_job_gets_nothing_and_learns_nothing(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    assert await who_may(cluster, base, "w0", STRANGER) == ["w0"]
    told = []
    for asked, held in ((base, ""), (base, base), ("0" * 64, "")):
        with pytest.raises(ForbiddenError, match="has no seat in it here") as refusal:
            await cluster.pull(asked, held, worker=STRANGER)
        told.append(refusal.value.message)
    assert len(set(told)) == 1
    async with asyncio.timeout(10):
        while not _refusals(cluster):  # noqa: ASYNC110 - another task writes it
            await asyncio.sleep(0.02)
    assert all(STRANGER in each["reason"] for each in _refusals(cluster))


def _refusals(cluster: Cluster) -> list[dict[str, str]]:
    records = read_log(cluster.settings.state_dir / "audit")
    return [each for each in records if each.get("what", "").endswith("/PullModel") and each["decision"] == "refused"]


async def test_a_seat_gives_the_right_and_whoever_takes_it_over_has_it_then(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    assert await who_may(cluster, base, "w0", "w1", "w3") == ["w0"]
    await seat(cluster, base, "w0", "w1")
    assert await who_may(cluster, base, "w0", "w1", "w3") == ["w0", "w1"]
    await seat(cluster, base, "w0", "w3")
    assert await who_may(cluster, base, "w0", "w1", "w3") == ["w0", "w3"]


async def test_a_restart_and_a_round_given_up_change_nothing(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await seat(cluster, base, "w0", "w1")
    await cluster.restart()
    assert await who_may(cluster, base, "w0", "w1", STRANGER) == ["w0", "w1"]
    await cluster.rounds.AbortRound(aggregator_pb2.AbortRoundRequest(job_id=JOB, round=1, fence=cluster.fence))
    assert await who_may(cluster, base, "w0", "w1", STRANGER) == ["w0", "w1"]
    await seat(cluster, base, "w0", "w3", attempt=1)
    assert await who_may(cluster, base, "w0", "w1", "w3", STRANGER) == ["w0", "w3"]


async def test_a_seat_that_takes_no_part_in_the_round_will_do_also_when_the_round_is_forgotten(
    cluster: Cluster,
) -> None:
    base = await cluster.first_version(arena_of(1))
    cluster.readers = ("w3",)
    made = await version_of(cluster, 1, base)
    await prune(cluster, 0, 1)
    await cluster.restart()
    assert await who_may(cluster, made, "w0", "w1", "w3", STRANGER) == ["w0", "w3"]


async def test_the_members_of_a_job_that_has_ended_take_its_model_home(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    # One that came in the round in which the job failed was given the key too.
    await seat(cluster, base, "w0", "w1")
    await prune(cluster, 0, ended=True)
    assert await who_may(cluster, base, "w0", "w1", "w3", STRANGER) == ["w0", "w1"]
    await cluster.restart()
    assert await who_may(cluster, base, "w0", "w1", "w3", STRANGER) == ["w0", "w1"]
