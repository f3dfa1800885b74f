"""Versions that travel as deltas: encoded once, served to who holds the base, and whole to everybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cortex_common.errors import NotFoundError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import RoundNumber
from cortex_common.rpc.channel import open_channel
from cortex_common.security.encryption import ObjectKind
from cortex_common.tensors import Arena, Manifest, TensorKind, model_sha256
from cortex_common.transfer import ChunkFrame, HeaderFrame, PullResult, pull_model
from cortex_common.transfer.frames import Frame
from cortex_common.transfer.pull import pull_frames, pull_request
from cortex_common.transfer.push import Progress
from tests.integration.aggregator.harness import JOB, MANIFEST, Cluster, arena_of, running_cluster
from tests.integration.aggregator.test_ended_jobs import prune
from tests.integration.aggregator.test_forwarding import Tiers, tiers

__all__ = ["tiers"]
from tests.links import CutLink, over

WHOLE = 4 * MANIFEST.elements


@dataclass
class Holder:
    """A worker's memory: one arena, and the version in it."""

    cluster: Cluster
    name: str = "w0"
    manifest: Manifest = MANIFEST
    held: str = ""

    def __post_init__(self) -> None:
        self.arena = Arena.zeros(self.manifest)

    async def pull(
        self, sha256: str, address: str = "", number: int = 1, on_progress: Progress | None = None
    ) -> PullResult:
        tls = self.cluster.tls_of(Role.WORKER, self.name)
        async with open_channel(address or self.cluster.address, tls, Role.AGGREGATOR, bulk=True) as channel:
            result = await pull_model(
                lambda: channel,
                JOB,
                sha256,
                self.held,
                self.cluster.encryption,
                lambda _: self.arena,
                RoundNumber(number),
                on_progress,
            )
        self.held = sha256
        assert model_sha256(self.manifest, self.arena) == sha256
        return result


@pytest.fixture
async def cluster(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tls_of, tmp_path) as running:
        running.download = "int8"
        yield running


async def frames_of(cluster: Cluster, sha256: str, held: str, worker: str = "w0") -> list[Frame]:
    request = pull_request(JOB, sha256, 0, RoundNumber(1), held)
    return [frame async for frame in pull_frames(cluster.channel(Role.WORKER, worker), request, "downloading")]


async def test_who_holds_the_base_gets_a_quarter_and_the_same_version(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(0))
    holder, late = Holder(cluster), Holder(cluster, "w1")
    assert (await holder.pull(first)).bytes_down > WHOLE
    base = first
    for number in (1, 2, 3):
        version = await cluster.next_version(number, base, arena_of(number, scale=0.01))
        await cluster.open(number + 1, version)
        result = await holder.pull(version, number=number + 1)
        assert result.header.kind is ObjectKind.DELTA
        assert result.bytes_down < 0.3 * WHOLE
        assert (await cluster.view(number + 1)).bytes_down == result.bytes_down
        base = version
    # Who holds nothing, or another version, ends with the very same numbers.
    assert (await late.pull(base)).header.kind is ObjectKind.MODEL
    assert late.arena.values.tobytes() == holder.arena.values.tobytes()
    stale = Holder(cluster, "w2", held="0" * 64)
    assert (await stale.pull(base)).header.kind is ObjectKind.MODEL


async def test_a_delta_is_sealed_once_for_all(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(0))
    version = await cluster.next_version(1, first, arena_of(1))
    one, two = [await frames_of(cluster, version, first, worker) for worker in ("w0", "w1")]
    assert isinstance(one[0], HeaderFrame)
    assert one == two
    await cluster.restart()
    assert await frames_of(cluster, version, first) == one


async def test_an_exact_round_leaves_nothing_out_and_travels_whole(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(0))
    updates = [arena_of(number, scale=0.1) for number in (1, 2)]
    lossy = await cluster.next_version(1, first, updates[0])
    cluster.download = "none"
    exact = await cluster.next_version(2, lossy, updates[1])
    holder = Holder(cluster, held=lossy)
    assert (await holder.pull(exact)).header.kind is ObjectKind.MODEL
    total = sum(each.values.astype(np.float64) for each in [arena_of(0), *updates])
    np.testing.assert_allclose(holder.arena.values, total, rtol=0, atol=2e-6)


async def test_numbers_that_are_not_those_claimed_are_fetched_whole(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(0))
    version = await cluster.next_version(1, first, arena_of(1))
    confused = Holder(cluster, held=first)
    confused.arena.values[:] = 7
    result = await confused.pull(version)
    assert result.header.kind is ObjectKind.MODEL


@pytest.mark.parametrize("damage", ["gone", "short"])
async def test_a_delta_that_is_damaged_on_the_disk_is_not_served(cluster: Cluster, damage: str) -> None:
    first = await cluster.first_version(arena_of(0))
    version = await cluster.next_version(1, first, arena_of(1))
    (blob,) = (cluster.settings.state_dir / "versions" / JOB).glob("1-*.delta.blob")
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(blob.read_bytes()[:-1])
    holder = Holder(cluster)
    await holder.pull(first)
    assert (await holder.pull(version)).header.kind is ObjectKind.MODEL


async def test_a_delta_goes_with_its_version(cluster: Cluster) -> None:
    first = await cluster.first_version(arena_of(0))
    version = await cluster.next_version(1, first, arena_of(1))
    await cluster.next_version(2, version, arena_of(2))
    folder = cluster.settings.state_dir / "versions" / JOB
    await prune(cluster, 2)
    assert {path.name.split("-")[0].split(".")[0] for path in folder.iterdir()} == {"2"}
    with pytest.raises(NotFoundError):
        await Holder(cluster).pull(version)


LARGE = Manifest.of([("w", (1000, 300), TensorKind.TRAINABLE)])


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_delta_broken_off_goes_on_where_it_was(cluster: Cluster, is_restarted: bool) -> None:
    """The chunks added before the cut are not added again, and not sent again."""
    cluster.chunk_elements = 16_384
    first = await cluster.first_version(arena_of(0, LARGE), LARGE)
    await cluster.open(1, first)
    pushed = await cluster.push(cluster.header(1, first, manifest=LARGE), arena_of(1, LARGE, scale=0.01))
    version = (await cluster.seal(1, [pushed.receipt])).version.sha256
    holder = Holder(cluster, manifest=LARGE)
    await holder.pull(first)
    host, port = cluster.address.rsplit(":", 1)
    link = CutLink(bytes_per_s=300_000)
    async with over(link, lambda: (host, int(port))) as address:
        started = asyncio.Event()
        pulling = asyncio.create_task(holder.pull(version, address, on_progress=lambda *_: started.set()))
        await started.wait()
        link.is_cut = True
        await link.broke.wait()
        if is_restarted:
            await cluster.restart()
        link.is_cut = False
        result = await pulling
    assert result.header.kind is ObjectKind.DELTA
    frames = await frames_of(cluster, version, first)
    assert result.bytes_down == sum(len(frame.sealed) for frame in frames if isinstance(frame, ChunkFrame))


async def test_a_region_fetches_the_delta_once_and_the_whole_version_for_who_needs_it(tiers: Tiers) -> None:
    """Its copy holds the one, the other, or both; what it has is served to the next who asks."""
    tiers.root.download = "int8"
    version = await tiers.root.next_version(2, tiers.base, arena_of(2, scale=0.01))
    folder = tiers.region.settings.state_dir / "versions" / JOB
    first, second, late = [Holder(tiers.region, name) for name in ("w0", "w1", "w2")]
    for holder in (first, second):
        await holder.pull(tiers.base)
    pulled = await asyncio.gather(first.pull(version), second.pull(version))
    assert {each.header.kind for each in pulled} == {ObjectKind.DELTA}
    assert {path.name.split(".", 1)[1] for path in folder.glob("2*")} == {"json", "delta.blob"}
    assert (await late.pull(version)).header.kind is ObjectKind.MODEL
    assert len(list(folder.glob("2-*.blob"))) == 2
    await tiers.region.restart()
    await tiers.open_region()
    await tiers.root.stop()
    again = Holder(tiers.region, held=tiers.base)
    again.arena.values[:] = arena_of(1).values
    again.arena.counters[:] = arena_of(1).counters
    assert (await again.pull(version)).header.kind is ObjectKind.DELTA
    await tiers.root.start()


async def test_a_region_asked_for_both_at_the_same_time_serves_both(tiers: Tiers) -> None:
    tiers.root.download = "int8"
    version = await tiers.root.next_version(2, tiers.base, arena_of(2, scale=0.01))
    holder = Holder(tiers.region)
    await holder.pull(tiers.base)
    workers = [Holder(tiers.region, f"w{index}") for index in range(1, 5)]
    pulled = await asyncio.gather(holder.pull(version), *(each.pull(version) for each in workers))
    # Who holds the base is content with the whole version too, where the others' download was begun first.
    assert pulled[0].header.kind in (ObjectKind.DELTA, ObjectKind.MODEL)
    assert {each.header.kind for each in pulled[1:]} == {ObjectKind.MODEL}
    assert {holder.held, *(each.held for each in workers)} == {version}
