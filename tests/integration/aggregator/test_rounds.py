"""Rounds from opening to the next version, over real mutual TLS."""

from __future__ import annotations

import asyncio
import hashlib
import io

import numpy as np
import pytest

from cortex_common.errors import ConflictError, CortexError, NotFoundError, PreconditionError
from cortex_common.identity import Role
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.tensors import write_safetensors
from cortex_common.transfer import Receipt
from tests.integration.aggregator.harness import JOB, MANIFEST, Cluster, arena_of


async def test_round_0_makes_an_exact_copy_and_pull_gives_it_back(cluster: Cluster) -> None:
    first = arena_of(1)
    first.values[0] = -0.0
    sha256 = await cluster.first_version(first)
    pulled = await cluster.pull(sha256, number=0)
    assert pulled.arena is not None
    assert pulled.arena.values.tobytes() == first.values.tobytes()
    assert pulled.arena.counters.tolist() == first.counters.tolist()
    file = io.BytesIO()
    write_safetensors(file, pulled.manifest, pulled.arena)
    assert hashlib.sha256(file.getvalue()).hexdigest() == sha256


async def push_all(cluster: Cluster, base: str, order: list[int], weights: list[float]) -> list[Receipt]:
    receipts = []
    for seat in order:
        header = cluster.header(1, base, seat, weights[seat])
        receipts.append((await cluster.push(header, arena_of(10 + seat, scale=0.01))).receipt)
    return receipts


@pytest.mark.parametrize("codec", ["none", "int8"])
async def test_the_next_version_is_the_weighted_mean_whatever_the_order_of_arrival(
    cluster: Cluster, codec: str
) -> None:
    base = arena_of(1)
    sha256 = await cluster.first_version(base)
    cluster.codec = codec
    weights = [3.0, 1.0, 2.0]
    await cluster.open(1, sha256, seats=3)
    receipts = await push_all(cluster, sha256, [2, 0, 1], weights)
    sealed = await cluster.seal(1, receipts)
    again = await cluster.seal(1, list(reversed(receipts)))
    assert again.version == sealed.version
    pulled = await cluster.pull(sealed.version.sha256)
    assert pulled.arena is not None
    deltas = [arena_of(10 + seat, scale=0.01) for seat in range(3)]
    mean = sum(w * d.values.astype(np.float64) for w, d in zip(weights, deltas, strict=True)) / 6.0
    want = base.values.astype(np.float64) + mean
    bound = 1e-7 if codec == "none" else 0.05 / 254
    np.testing.assert_allclose(pulled.arena.values, want, atol=bound, rtol=1e-6)
    if codec == "none":
        assert pulled.arena.values.tobytes() == want.astype(np.float32).tobytes()
    assert pulled.arena.counters.tolist() == max(d.counters.tolist() for d in [base, *deltas])
    assert sealed.update_norm == pytest.approx(float(np.linalg.norm(mean)), rel=0.01)

    await cluster.open(1, sha256, seats=3, attempt=1)
    redone = [
        (await cluster.push(cluster.header(1, sha256, seat, weights[seat], attempt=1), deltas[seat])).receipt
        for seat in (1, 2, 0)
    ]
    assert (await cluster.seal(1, redone, attempt=1)).version.sha256 == sealed.version.sha256


async def test_watchers_see_progress_and_the_end(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.open(1, sha256, seats=2)
    seen: list[aggregator_pb2.WatchRoundResponse] = []

    async def watch() -> None:
        request = aggregator_pb2.WatchRoundRequest(job_id=JOB, round=1)
        async for view in cluster.rounds.WatchRound(request):
            seen.append(view)

    watching = asyncio.create_task(watch())
    await cluster.pull(sha256)
    receipts = await push_all(cluster, sha256, [0, 1], [1.0, 1.0])
    await cluster.seal(1, receipts)
    await watching
    assert not seen[0].closed
    assert [seat.worker for seat in seen[0].seats] == ["w0", "w1"]
    assert seen[-1].closed
    assert [seat.receipt.content_sha256 for seat in seen[-1].seats] == [each.content_sha256 for each in receipts]
    assert seen[-1].bytes_down > 4 * MANIFEST.elements


async def test_a_stale_fence_is_refused_also_after_a_restart(cluster: Cluster) -> None:
    cluster.fence = 7
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.restart()
    cluster.fence = 6
    with pytest.raises(ConflictError, match="fence 6 is stale"), calling("aggregator"):
        await cluster.open(1, sha256)
    with pytest.raises(ConflictError, match="fence 6 is stale"), calling("aggregator"):
        await cluster.seal(0, [])


async def test_a_late_upload_names_the_round_now_open(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.open(1, sha256, seats=2)
    late = cluster.header(1, sha256, 1)
    receipts = await push_all(cluster, sha256, [0], [1.0])
    second = (await cluster.seal(1, receipts)).version.sha256
    with pytest.raises(PreconditionError, match=r"round 1 of job job-1 is sealed.*no round"):
        await cluster.push(late, arena_of(2))
    await cluster.open(2, second, seats=2)
    with pytest.raises(PreconditionError, match="round 2 of job job-1 is open now"):
        await cluster.push(late, arena_of(2))


async def test_an_aborted_round_refuses_uploads_with_the_reason(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.open(1, sha256)
    request = aggregator_pb2.AbortRoundRequest(job_id=JOB, round=1, fence=1, reason="too few workers")
    await cluster.rounds.AbortRound(request)
    await cluster.rounds.AbortRound(request)
    with pytest.raises(PreconditionError, match="given up \\(too few workers\\)"):
        await cluster.push(cluster.header(1, sha256), arena_of(2))
    assert not list(cluster.spool(1).glob("seat-*"))


async def test_only_listed_accepted_updates_can_be_sealed(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    await cluster.open(1, sha256, seats=2)
    receipts = await push_all(cluster, sha256, [0], [1.0])
    wrong = [*receipts, Receipt(JOB, 1, 0, 1, "w1", "0" * 64, 1.0, 0, 0)]
    with pytest.raises(PreconditionError, match="no update of seat 1"), calling("aggregator"):
        await cluster.seal(1, wrong)
    await cluster.seal(1, receipts)
    with pytest.raises(PreconditionError, match="another list"), calling("aggregator"):
        await cluster.seal(1, wrong)


async def test_pruning_keeps_what_is_named_and_what_is_needed(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(1))
    await cluster.open(1, first)
    second = (await cluster.seal(1, await push_all(cluster, first, [0], [1.0]))).version.sha256
    await cluster.open(2, second)
    prune = aggregator_pb2.PruneJobRequest(job_id=JOB, fence=1, keep_rounds=[1])
    assert (await cluster.rounds.PruneJob(prune)).removed_versions == 1
    assert not cluster.spool(1).exists()
    assert (await cluster.pull(second)).arena is not None
    with pytest.raises(NotFoundError, match="versions of these rounds are: 1"):
        await cluster.pull(first)


async def test_a_held_version_costs_no_chunk(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    pulled = await cluster.pull(sha256, held=sha256)
    assert pulled.arena is None
    assert pulled.bytes_down == 0
    assert pulled.manifest == MANIFEST


async def test_opening_needs_the_base_and_goes_only_forward(cluster: Cluster) -> None:
    sha256 = await cluster.first_version(arena_of(1))
    with pytest.raises(NotFoundError, match="no version"), calling("aggregator"):
        await cluster.open(1, "0" * 64)
    await cluster.open(2, sha256)
    with pytest.raises(PreconditionError, match="round 2"), calling("aggregator"):
        await cluster.open(1, sha256)


async def test_a_sum_that_overflows_does_not_become_a_version(cluster: Cluster) -> None:
    base = arena_of(1)
    base.values[5] = 3e38
    sha256 = await cluster.first_version(base)
    await cluster.open(1, sha256)
    delta = arena_of(2)
    delta.values[5] = 3e38
    receipt = (await cluster.push(cluster.header(1, sha256), delta)).receipt
    with pytest.raises(PreconditionError, match="not finite"), calling("aggregator"):
        await cluster.seal(1, [receipt])
    assert (await cluster.pull(sha256)).arena is not None


async def test_workers_may_not_open_rounds(cluster: Cluster) -> None:
    from cortex_common.pb.v1 import aggregator_pb2_grpc

    stub = aggregator_pb2_grpc.RoundServiceStub(cluster.channel(Role.WORKER, "w0"))
    with pytest.raises(CortexError, match="may not call"), calling("aggregator"):
        await stub.OpenRound(aggregator_pb2.OpenRoundRequest(round=cluster.spec(0)))
