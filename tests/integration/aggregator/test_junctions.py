"""A region in a region: what the aggregator between takes from below, passes on, fetches from above, and survives."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cortex_common.errors import ForbiddenError, NotFoundError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.ids import JobId
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.tensors import Arena
from cortex_common.transfer import Receipt
from cortex_common.transfer.wire import receipt_from_proto
from tests.integration.aggregator.harness import (
    JOB,
    MANIFEST,
    Cluster,
    arena_of,
    object_begun,
    running_cluster,
    settings_for,
)
from tests.integration.aggregator.test_readers import who_may
from tests.integration.aggregator.test_restarts import KillableCluster
from tests.keys import wrapped
from tests.links import Link, over
from tests.waiting import eventually

PARIS, EU = "aggregator-eu.paris", "aggregator-eu"
LEAF, OWN, JUNCTION = (JobId(f"{JOB}-t{index}") for index in range(3))
"""Of eu.paris at its own aggregator; of eu, at its own; and of both together, there too."""


@dataclass
class Place:
    """A root, an aggregator in eu and one in eu.paris; w0 and w1 are in Paris, w2 is elsewhere in eu."""

    root: Cluster
    eu: KillableCluster
    paris: Cluster
    base: str = ""

    async def open(
        self, at: Cluster, job_id: JobId, seats: Mapping[int, str], above: aggregator_pb2.Upstream | None = None
    ) -> None:
        spec = at.spec(1, self.base)
        spec.job_id, spec.codec = job_id, "none" if job_id in (JOB, JUNCTION) else at.codec
        del spec.seats[:]
        spec.seats.extend(aggregator_pb2.Seat(seat=seat, worker=name) for seat, name in seats.items())
        spec.data_key.CopyFrom(wrapped(at.sealing_key, job_id, at.key))
        if above is not None:
            spec.upstream.CopyFrom(above)
        with calling("aggregator"):
            await at.rounds.OpenRound(aggregator_pb2.OpenRoundRequest(round=spec), timeout=10)

    async def open_root(self) -> None:
        await self.open(self.root, JOB, {2: EU})

    async def open_junction(self) -> None:
        above = aggregator_pb2.Upstream(
            aggregator="aggregator-1", address=self.root.address, job_id=JOB, seat=2, model_job_id=JOB
        )
        await self.open(self.eu, JUNCTION, {0: PARIS, 1: EU}, above)

    async def open_leaf(self, address: str = "") -> None:
        above = self._junction(0)
        above.address = address or above.address
        await self.open(self.paris, LEAF, {0: "w0", 1: "w1"}, above)

    async def open_own(self) -> None:
        await self.open(self.eu, OWN, {2: "w2"}, self._junction(1))

    def _junction(self, seat: int) -> aggregator_pb2.Upstream:
        return aggregator_pb2.Upstream(
            aggregator=EU, address=self.eu.address, job_id=JUNCTION, seat=seat, model_job_id=JOB
        )

    async def push(self, at: Cluster, job_id: JobId, seat: int, weight: float) -> Receipt:
        header = replace(at.header(1, self.base, seat, weight), job_id=job_id)
        return (await at.push(header, arena_of(10 + seat))).receipt

    async def forward(self, at: Cluster, job_id: JobId, listed: Sequence[Receipt]) -> Receipt:
        """As a coordinator does: asked again while somebody is away."""
        request = aggregator_pb2.ForwardRoundRequest(
            job_id=job_id,
            round=1,
            fence=1,
            contributions=[
                aggregator_pb2.Contribution(
                    seat=each.seat, worker=each.worker, content_sha256=each.content_sha256, weight=each.weight
                )
                for each in listed
            ],
            data_key=wrapped(at.sealing_key, job_id, at.key),
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    with calling("aggregator"):
                        return receipt_from_proto((await at.rounds.ForwardRound(request, timeout=20)).receipt)
                except UnavailableError:
                    await asyncio.sleep(0.05)

    async def revive(self) -> None:
        """kill -9 of the aggregator between, and another process in its place, at another port."""
        await self.eu.end(signal.SIGKILL)
        await self.eu.start()

    async def pulled(self, sha256: str) -> Arena:
        arena = (await self.root.pull(sha256)).arena
        assert arena is not None
        return arena

    def copies(self, at: Cluster) -> list[str]:
        return sorted(path.name for path in (at.settings.state_dir / "versions" / JOB).glob("*.blob"))


@pytest.fixture
async def place(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Place]:
    """The round of none of them is open yet."""
    async with AsyncExitStack() as running:
        root = await running.enter_async_context(running_cluster(tls_of, tmp_path / "root"))
        places: list[Cluster] = []
        for kind, name in ((KillableCluster, EU), (Cluster, PARIS)):
            state_dir = tmp_path / name / "state"
            state_dir.parent.mkdir()
            settings = settings_for(tls_of(Role.AGGREGATOR, name), state_dir, name=name, forward_patience_s=0.3)
            cluster = kind(tls_of, settings, key=root.key)
            await cluster.start()
            running.push_async_callback(cluster.stop)
            places.append(cluster)
        eu, paris = places
        assert isinstance(eu, KillableCluster)
        made = Place(root, eu, paris, await root.first_version(arena_of(1)))
        yield made


async def opened(place: Place) -> Place:
    await place.open_root()
    await place.open_junction()
    await place.open_own()
    await place.open_leaf()
    return place


def mean_of(weights: Mapping[int, float]) -> np.ndarray:
    """Of the updates of these seats, in float64."""
    total = sum(arena_of(10 + seat).values.astype(np.float64) * weight for seat, weight in weights.items())
    return np.asarray(total / sum(weights.values()))


@pytest.mark.parametrize("codec", ["none", "int8"])
async def test_the_sums_of_both_levels_are_the_mean_of_all(place: Place, codec: str) -> None:
    place.paris.codec = place.eu.codec = codec
    await opened(place)
    inner = [await place.push(place.paris, LEAF, seat, weight) for seat, weight in ((0, 10.0), (1, 30.0))]
    own = await place.push(place.eu, OWN, 2, 20.0)
    below = [await place.forward(place.paris, LEAF, inner), await place.forward(place.eu, OWN, [own])]
    assert [(each.seat, each.worker, each.weight) for each in below] == [(0, PARIS, 40.0), (1, EU, 20.0)]
    above = await place.forward(place.eu, JUNCTION, below)
    assert (above.seat, above.worker, above.weight) == (2, EU, 60.0)
    sealed = await place.root.seal(1, [above])
    change = (await place.pulled(sealed.version.sha256)).values - arena_of(1).values
    quantised = 3 * np.abs(arena_of(10).values).max() / 127 if codec == "int8" else 0.0
    np.testing.assert_allclose(change, mean_of({0: 10, 1: 30, 2: 20}), atol=1e-5 + quantised)


async def test_a_version_comes_down_from_level_to_level_and_once_to_each(place: Place) -> None:
    await opened(place)
    assert (await place.pulled(place.base)).values.size == MANIFEST.elements
    for name in ("w0", "w1", "w0"):
        assert (await place.paris.pull(place.base, worker=name)).arena is not None
    assert len(place.copies(place.eu)) == len(place.copies(place.paris)) == 1
    assert (await place.eu.pull(place.base, worker="w2")).arena is not None
    # A newer one, whose round those below have not been told of: it is asked for where they were told last.
    version = await place.root.next_version(2, place.base, arena_of(5))
    assert (await place.paris.pull(version)).arena is not None
    assert len(place.copies(place.eu)) == len(place.copies(place.paris)) == 2
    await place.root.stop()
    assert (await place.paris.pull(version, worker="w1")).arena is not None
    assert (await place.eu.pull(version, worker="w2")).arena is not None
    await place.root.start()


async def test_when_the_aggregator_between_is_lost_a_download_under_way_goes_on_from_the_next(place: Place) -> None:
    await opened(place)
    version = await place.root.next_version(2, place.base, arena_of(5))
    await place.eu.end(signal.SIGKILL)
    waiting = asyncio.create_task(place.paris.pull(version))
    downloads = place.paris.running.aggregator._relay._running
    await eventually(lambda: bool(downloads))
    above = aggregator_pb2.Upstream(aggregator="aggregator-1", address=place.root.address, job_id=JOB, seat=0)
    await place.open(place.paris, LEAF, {0: "w0", 1: "w1"}, above)
    async with asyncio.timeout(10):
        assert (await waiting).arena is not None
    await place.eu.start()


async def test_the_aggregator_between_serves_its_own_workers_and_those_below_it_nobody_elses(place: Place) -> None:
    place.root.readers = place.eu.readers = place.paris.readers = ()
    await place.open_root()
    await place.open_junction()
    with pytest.raises(ForbiddenError):
        await place.eu.pull(place.base, worker="w2")
    await place.open_own()
    await place.open_leaf()
    assert await who_may(place.eu, place.base, "w0", "w2", "w3") == ["w2"]
    assert await who_may(place.paris, place.base, "w0", "w2", "w3") == ["w0"]


async def test_nobody_asks_itself_for_a_version(place: Place) -> None:
    """Its own leaf's upper round is here: before that one is open, nobody knows where versions come from."""
    await place.open_root()
    async with asyncio.timeout(10):
        with pytest.raises(NotFoundError, match="no version"):
            await place.open_own()
        await place.open_junction()
        await place.open_own()
        with pytest.raises(NotFoundError):
            await place.eu.pull("0" * 64, worker="w2")
        assert (await place.eu.pull(place.base, worker="w2")).arena is not None


async def test_kill_9_between_costs_no_update_and_counts_none_twice(place: Place) -> None:
    await opened(place)
    inner = [await place.push(place.paris, LEAF, seat, weight) for seat, weight in ((0, 10.0), (1, 30.0))]
    own = await place.push(place.eu, OWN, 2, 20.0)
    first = await place.forward(place.paris, LEAF, inner)
    await place.revive()
    # What it had accepted it still has, and says so to who asks again; it needs no key for that.
    await place.open_junction()
    await place.open_leaf()
    assert (await place.forward(place.paris, LEAF, inner)).content_sha256 == first.content_sha256
    await place.open_own()
    second = await place.forward(place.eu, OWN, [own])
    await place.revive()
    above = await place.forward(place.eu, JUNCTION, [first, second])
    await place.revive()
    # Made anew, it is another object: the one that the root has counts.
    again = await place.forward(place.eu, JUNCTION, [first, second])
    assert again.content_sha256 == above.content_sha256
    sealed = await place.root.seal(1, [again])
    change = (await place.pulled(sealed.version.sha256)).values - arena_of(1).values
    np.testing.assert_allclose(change, mean_of({0: 10, 1: 30, 2: 20}), atol=1e-5)


async def test_an_upload_from_below_goes_on_where_a_killed_aggregator_has_it(place: Place) -> None:
    await opened(place)
    inner = [await place.push(place.paris, LEAF, seat, weight) for seat, weight in ((0, 10.0), (1, 30.0))]
    link = Link(bytes_per_s=20_000)

    def eu() -> tuple[str, int]:
        host, port = place.eu.address.rsplit(":", 1)
        return host, int(port)

    async with over(link, eu) as address:
        await place.open_leaf(address)
        forwarding = asyncio.create_task(place.forward(place.paris, LEAF, inner))
        await until_one_chunk(place.eu)
        await place.eu.end(signal.SIGKILL)
        begun = object_from_below(place.eu)
        await place.eu.start()
        await place.open_junction()
        receipt = await forwarding
    assert receipt.newly_accepted
    assert object_from_below(place.eu) == begun
    assert (receipt.seat, receipt.worker, receipt.weight) == (0, PARIS, 40.0)
    above = await place.forward(place.eu, JUNCTION, [receipt])
    sealed = await place.root.seal(1, [above])
    change = (await place.pulled(sealed.version.sha256)).values - arena_of(1).values
    np.testing.assert_allclose(change, mean_of({0: 10, 1: 30}), atol=1e-5)


def object_from_below(eu: Cluster) -> str:
    """What Paris has begun to send."""
    return object_begun(eu.settings.state_dir / "spool" / JUNCTION / "1-0" / "seat-0.update")


async def until_one_chunk(eu: Cluster) -> None:
    """Of what comes from Paris."""
    async with asyncio.timeout(10):
        async for view in eu.rounds.WatchRound(aggregator_pb2.WatchRoundRequest(job_id=JUNCTION, round=1)):
            if view.seats[0].chunks_received:
                return
