"""Pruning while a job runs, and what is left once it has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_common.errors import CortexError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from tests.integration.aggregator.harness import JOB, Cluster, arena_of
from tests.integration.aggregator.test_uploads import RawUpload, cut_after


async def prune(cluster: Cluster, *keep: int, ended: bool = False) -> int:
    request = aggregator_pb2.PruneJobRequest(job_id=JOB, fence=cluster.fence, keep_rounds=keep, ended=ended)
    with calling("aggregator"):
        return (await cluster.rounds.PruneJob(request)).removed_versions


def left_of_job(cluster: Cluster) -> list[str]:
    """Everything on the disk that belongs to the job."""
    state = cluster.settings.state_dir
    paths: list[Path] = [state / "spool" / JOB, state / "versions" / JOB, state / "fences" / JOB]
    return [str(path.relative_to(state)) for path in paths if path.exists()]


async def version_of(cluster: Cluster, number: int, base: str) -> str:
    await cluster.open(number, base)
    receipt = (await cluster.push(cluster.header(number, base), arena_of(10 + number))).receipt
    return (await cluster.seal(number, [receipt])).version.sha256


async def test_nothing_is_left_of_a_job_that_ended_while_collecting(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base, seats=2)
    await cluster.push(cluster.header(1, base, 1), arena_of(2))
    upload = RawUpload(cluster, cluster.header(1, base))
    await upload.begin()
    watch = cluster.rounds.WatchRound(aggregator_pb2.WatchRoundRequest(job_id=JOB, round=1))
    await watch.read()
    assert await prune(cluster, ended=True) == 1
    with pytest.raises(PreconditionError, match="the job has ended"):
        await upload.error()
    while not (await watch.read()).closed:
        pass  # what was accepted before may be told first
    assert left_of_job(cluster) == []
    assert await prune(cluster, ended=True) == 0
    with pytest.raises(PreconditionError, match="no round of this job is open here"):
        await cluster.push(cluster.header(1, base), arena_of(2))
    await cluster.restart()
    assert left_of_job(cluster) == []


async def test_the_kept_versions_of_an_ended_job_are_served_without_its_key(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    second = await version_of(cluster, 1, base)
    third = await version_of(cluster, 2, second)
    await cluster.open(3, third)
    assert await prune(cluster, 1, ended=True) == 2
    assert left_of_job(cluster) == [f"versions/{JOB}", f"fences/{JOB}"]
    assert (await cluster.pull(second)).arena is not None
    with pytest.raises(NotFoundError, match="versions of these rounds are: 1"):
        await cluster.pull(third)
    # A coordinator that opens a round all the same brings everything that is needed.
    await cluster.open(4, second)
    receipt = (await cluster.push(cluster.header(4, second), arena_of(2))).receipt
    assert (await cluster.seal(4, [receipt])).version.sha256
    assert await prune(cluster, ended=True) == 2
    assert left_of_job(cluster) == []


async def test_leftovers_of_rounds_given_up_and_of_partial_updates_go_too(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    await cut_after(cluster, cluster.header(1, base), arena_of(2), 2)
    await cluster.open(1, base, attempt=1)
    await cluster.restart()
    await prune(cluster, 0, ended=True)
    assert left_of_job(cluster) == [f"versions/{JOB}", f"fences/{JOB}"]
    await cluster.restart()
    with pytest.raises(PreconditionError):
        await cluster.push(cluster.header(1, base, attempt=1), arena_of(2))


async def test_a_stale_coordinator_ends_nothing(cluster: Cluster) -> None:
    cluster.fence = 3
    base = await cluster.first_version(arena_of(1))
    cluster.fence = 2
    with pytest.raises(CortexError, match="stale"):
        await prune(cluster, ended=True)
    assert (await cluster.pull(base)).arena is not None


async def test_a_late_prune_spares_the_newest_version(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    second = await version_of(cluster, 1, base)
    assert await prune(cluster, 0) == 0
    assert await prune(cluster) == 0
    assert (await cluster.pull(second)).arena is not None
    assert await prune(cluster, 1) == 1


async def test_a_late_prune_spares_a_frozen_round_that_has_no_version_yet(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    second = await version_of(cluster, 1, base)
    await cluster.open(2, second)
    receipt = (await cluster.push(cluster.header(2, second), arena_of(2))).receipt
    blob = next((cluster.settings.state_dir / "versions" / JOB).glob("1-0-*.blob"))
    hidden = blob.with_name("hidden")
    blob.rename(hidden)
    with pytest.raises(CortexError), calling("aggregator"):
        await cluster.seal(2, [receipt])
    hidden.rename(blob)
    # Frozen, not folded. A prune that was decided for an earlier round arrives.
    assert await prune(cluster, 0, 5) == 0
    assert (await cluster.seal(2, [receipt])).version.round == 2


async def test_the_base_of_an_open_round_stays(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(2, base)
    assert await prune(cluster, 5) == 0
    receipt = (await cluster.push(cluster.header(2, base), arena_of(2))).receipt
    assert (await cluster.seal(2, [receipt])).version.round == 2


async def test_a_round_that_waits_for_its_key_ends_with_its_job(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    await cluster.restart()
    with pytest.raises(UnavailableError, match="not open yet"):
        await RawUpload(cluster, cluster.header(1, base)).begin()
    await prune(cluster, 0, ended=True)
    with pytest.raises(PreconditionError, match="not open"):
        await RawUpload(cluster, cluster.header(1, base)).begin()
