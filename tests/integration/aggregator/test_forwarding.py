"""A region and its root: pushing up while the root is away or has moved, copies that went bad."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cortex_common.errors import CortexError, ForbiddenError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import JobId
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.transfer import Receipt
from tests.integration.aggregator.harness import JOB, Cluster, arena_of, object_begun, running_cluster, settings_for
from tests.integration.aggregator.test_readers import who_may
from tests.integration.aggregator.test_uploads import until_received
from tests.keys import wrapped
from tests.links import CutLink, over

TIER = JobId(f"{JOB}-t0")
REGION = "aggregator-region"


@dataclass
class Tiers:
    """A root with one seat, that of a region with one worker."""

    root: Cluster
    region: Cluster
    base: str = ""

    async def open_root(self) -> None:
        spec = self.root.spec(1, self.base)
        spec.seats[0].worker = REGION
        await self.root.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec))

    async def open_region(self, address: str = "") -> None:
        spec = self.region.spec(1, self.base)
        spec.job_id = TIER
        spec.data_key.CopyFrom(wrapped(self.region.sealing_key, TIER, self.region.key))
        spec.upstream.CopyFrom(
            aggregator_pb2.Upstream(aggregator="aggregator-1", address=address or self.root.address, job_id=JOB, seat=0)
        )
        await self.region.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec))

    async def push(self) -> Receipt:
        header = replace(self.region.header(1, self.base), job_id=TIER)
        return (await self.region.push(header, arena_of(2))).receipt

    async def forward(self, receipt: Receipt) -> aggregator_pb2.ForwardRoundResponse:
        request = aggregator_pb2.ForwardRoundRequest(
            job_id=TIER,
            round=1,
            fence=1,
            contributions=[
                aggregator_pb2.Contribution(
                    seat=0, worker="w0", content_sha256=receipt.content_sha256, weight=receipt.weight
                )
            ],
            data_key=wrapped(self.region.sealing_key, TIER, self.region.key),
        )
        with calling("aggregator"):
            return await self.region.rounds.ForwardRound(request, timeout=20)

    async def forward_at_last(self, receipt: Receipt) -> aggregator_pb2.ForwardRoundResponse:
        """As a coordinator does: ask again until it is through."""
        async with asyncio.timeout(15):
            while True:
                try:
                    return await self.forward(receipt)
                except UnavailableError:
                    continue


@pytest.fixture
async def tiers(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Tiers]:
    async with AsyncExitStack() as running:
        root = await running.enter_async_context(running_cluster(tls_of, tmp_path / "root"))
        tls = tls_of(Role.AGGREGATOR, REGION)
        settings = settings_for(tls, tmp_path / "region", name=REGION, forward_patience_s=0.3)
        region = Cluster(tls_of, settings, key=root.key)
        await region.start()
        running.push_async_callback(region.stop)
        made = Tiers(root, region)
        made.base = await root.first_version(arena_of(1))
        await made.open_root()
        await made.open_region()
        yield made


async def test_a_root_that_has_not_reopened_the_round_is_told_and_forwarding_goes_on_later(tiers: Tiers) -> None:
    receipt = await tiers.push()
    await tiers.root.restart()
    with pytest.raises(UnavailableError, match="not open yet: its coordinator has not come back"):
        await tiers.forward(receipt)
    await tiers.open_root()
    answer = await tiers.forward_at_last(receipt)
    assert answer.receipt.worker == REGION
    assert (await tiers.forward(receipt)).receipt.content_sha256 == answer.receipt.content_sha256


def object_at_root(tiers: Tiers) -> str:
    return object_begun(tiers.root.spool(1) / "seat-0.update")


async def test_an_upload_given_up_goes_on_when_asked_for_again(tiers: Tiers) -> None:
    receipt = await tiers.push()
    host, port = tiers.root.address.rsplit(":", 1)
    link = CutLink(bytes_per_s=25_000)
    async with over(link, lambda: (host, int(port))) as address:
        await tiers.open_region(address)
        forwarding = asyncio.create_task(tiers.forward(receipt))
        await until_received(tiers.root, 1, 1)
        link.is_cut = True
        with pytest.raises(UnavailableError):
            await forwarding
        begun = object_at_root(tiers)
        link.is_cut = False
        answer = await tiers.forward_at_last(receipt)
        assert answer.receipt.newly_accepted
        assert object_at_root(tiers) == begun


async def test_a_root_that_is_away_is_told(tiers: Tiers) -> None:
    receipt = await tiers.push()
    await tiers.root.stop()
    with pytest.raises(UnavailableError, match="uploading round 1"):
        await tiers.forward(receipt)
    await tiers.root.start()
    await tiers.open_root()
    assert (await tiers.forward_at_last(receipt)).receipt.worker == REGION


async def test_a_root_that_moved_is_found_while_forwarding(tiers: Tiers) -> None:
    receipt = await tiers.push()
    address = tiers.root.address
    await tiers.open_region(address="127.0.0.1:1")
    with pytest.raises(UnavailableError):
        await tiers.forward(receipt)
    waiting = asyncio.create_task(tiers.forward(receipt))
    await tiers.open_region(address=address)
    try:
        answer = await waiting
    except UnavailableError:
        answer = await tiers.forward_at_last(receipt)
    assert answer.receipt.worker == REGION
    await tiers.region.restart()
    assert (await tiers.forward(receipt)).receipt.content_sha256 == answer.receipt.content_sha256


async def test_an_ended_job_stops_forwarding(tiers: Tiers) -> None:
    receipt = await tiers.push()
    await tiers.root.stop()
    tiers.region.settings = tiers.region.settings.model_copy(update={"forward_patience_s": 60.0})
    await tiers.region.restart()
    await tiers.open_region()
    waiting = asyncio.create_task(tiers.forward(receipt))
    request = aggregator_pb2.PruneJobRequest(job_id=TIER, fence=1, ended=True)
    async with asyncio.timeout(10):
        while not waiting.done():
            await tiers.region.rounds.PruneJob(request)
        with pytest.raises(PreconditionError):
            await waiting
    await tiers.root.start()


async def test_a_copy_whose_blob_is_gone_or_short_is_fetched_again(tiers: Tiers) -> None:
    for damage in (lambda blob: blob.unlink(), lambda blob: blob.write_bytes(blob.read_bytes()[:-9])):
        blob = next((tiers.region.settings.state_dir / "versions" / JOB).glob("0-0-*.blob"))
        damage(blob)
        assert (await tiers.region.pull(tiers.base)).arena is not None
    blob = next((tiers.region.settings.state_dir / "versions" / JOB).glob("0-0-*.blob"))
    blob.unlink()
    await tiers.region.restart()
    await tiers.open_region()
    assert (await tiers.region.pull(tiers.base)).arena is not None


async def test_a_damaged_version_of_its_own_is_not_thrown_away(tiers: Tiers) -> None:
    folder = tiers.root.settings.state_dir / "versions" / JOB
    blob = next(folder.glob("0-0-*.blob"))
    blob.write_bytes(blob.read_bytes()[:-9])
    with pytest.raises((CortexError, TimeoutError)):
        await asyncio.wait_for(tiers.root.pull(tiers.base), 2)
    assert blob.exists()


async def test_a_region_serves_its_own_workers_and_fetches_nothing_for_others(tiers: Tiers) -> None:
    tiers.root.readers = tiers.region.readers = ()
    version = await tiers.root.next_version(2, tiers.base, arena_of(2))
    await tiers.open_region()
    folder = tiers.region.settings.state_dir / "versions" / JOB
    assert await who_may(tiers.region, version, "w1") == []
    assert list(folder.glob("2*")) == []
    assert await who_may(tiers.region, version, "w0", "w1") == ["w0"]
    await tiers.region.restart()
    assert await who_may(tiers.region, version, "w0", "w1") == ["w0"]
    for job_id in (TIER, JOB):
        request = aggregator_pb2.PruneJobRequest(job_id=job_id, fence=1, keep_rounds=[2], ended=True)
        with calling("aggregator"):
            await tiers.region.rounds.PruneJob(request)
    assert await who_may(tiers.region, version, "w0", "w1") == ["w0"]


async def test_the_root_knows_of_the_regions_workers_what_it_is_told(tiers: Tiers) -> None:
    tiers.root.readers = ("w3",)
    await tiers.open_root()
    for worker, error in (("w3", NotFoundError), ("w5", ForbiddenError)):
        with pytest.raises(error):
            await tiers.root.pull("0" * 64, worker=worker)
