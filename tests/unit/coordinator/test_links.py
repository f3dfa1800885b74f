"""The order in which a tree of rounds is opened, forwarded and folded, and what an aggregator that is away holds up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

import pytest

from cortex_common.errors import CorruptError, CortexError, InvalidArgumentError, PreconditionError, UnavailableError
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.parse import parse_job
from cortex_common.security.encryption import EncryptionManager
from services.coordinator.client import Forwarded, Progress
from services.coordinator.domain.job import Contribution
from services.coordinator.domain.seen import AggregatedVersion, Hop, Seen
from services.coordinator.links import Junction, Leaf, Links
from services.coordinator.orders import DataKeys, RoundOrder, SealOrder
from tests.fakes import ManualClock
from tests.unit.coordinator.jobs import AGGREGATED, document, update

SPEC = parse_job(document())
KEYS = DataKeys(EncryptionManager.new_data_key())


class Aggregators:
    """Notes what it is asked, by the tier's number; fails as often as it is told to, waits where it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, list[CortexError]] = defaultdict(list)
        self.stuck: set[str] = set()

    async def _asked(self, what: str) -> None:
        self.calls.append(what)
        await asyncio.sleep(0)
        if self.failures[what]:
            raise self.failures[what].pop(0)
        if what in self.stuck:
            await asyncio.Event().wait()

    async def open_round(self, address: str, order: RoundOrder) -> None:
        await self._asked(f"open {address}")

    async def watch_round(self, address: str, order: RoundOrder) -> AsyncIterator[Progress]:
        yield Progress({}, {})
        await asyncio.Event().wait()

    async def forward_round(self, address: str, order: SealOrder) -> Forwarded:
        await self._asked(f"forward {address} {','.join(str(each.seat) for each in order.contributions)}")
        weight = sum(each.weight for each in order.contributions)
        return Forwarded(update(int(address), f"agg-{address}", weight), relayed_bytes=int(address))

    async def seal_round(self, address: str, order: SealOrder) -> AggregatedVersion:
        listed = ",".join(f"{each.seat}:{each.weight:.0f}" for each in order.contributions)
        await self._asked(f"seal {address} {listed}")
        return AGGREGATED


class Place:
    """Links to such aggregators, and what they see."""

    def __init__(self) -> None:
        self.aggregators = Aggregators()
        self.clock = ManualClock()
        self.links = Links(self.aggregators, self.clock)  # type: ignore[arg-type]
        self.seen = Seen(since_s=0.0)

    def observe(self, change: Callable[[Seen], Seen]) -> None:
        self.seen = change(self.seen)

    async def seal(self, root: Leaf | Junction) -> None:
        await self._run(self.links.seal(root, self.observe))

    async def collect(self, root: Leaf | Junction) -> None:
        """For a while."""
        with suppress(TimeoutError):
            await self._run(self.links.collect(root, self.observe))

    async def _run(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        for _ in range(30):
            await self.clock.advance(1.0)
            if task.done():
                return await task
        task.cancel()
        raise TimeoutError


def order(number: str, *seats: int) -> RoundOrder:
    members = {SeatIndex(seat): NodeName(f"w{seat}") for seat in seats}
    return RoundOrder(JobId(f"j1-t{number}"), 1, 1, 7, "b" * 64, members, SPEC, KEYS, 1024)


def leaf(number: int | str, *seats: int, listed: bool = True) -> Leaf:
    updates: tuple[Contribution, ...] = tuple(update(seat, f"w{seat}", 10.0) for seat in seats)
    return Leaf(order(str(number), *seats), partial(str, number), updates if listed else ())


def junction(number: int | str, **below: Leaf | Junction) -> Junction:
    tiers = {int(name.removeprefix("t")): tier for name, tier in below.items()}
    return Junction(order(str(number), *tiers), partial(str, number), tiers)


def three_levels() -> Junction:
    inner = junction(3, t0=leaf(0, 0, 1), t1=leaf(1, 2))
    return junction("root", t2=leaf(2, 3), t4=junction(4, t3=inner, t5=leaf(5, 4)))


async def test_what_is_below_comes_first_at_any_depth() -> None:
    place = Place()
    await place.seal(three_levels())
    calls = place.aggregators.calls
    assert sorted(calls) == sorted(
        ["open root", "open 4", "open 3", "forward 0 0,1", "forward 1 2", "forward 2 3", "forward 5 4",
         "forward 3 0,1", "forward 4 3,5", "seal root 2:10,4:40"]
    )  # fmt: skip
    for first, then in (
        ("open root", "forward 2 3"), ("open 4", "forward 3 0,1"), ("open 3", "forward 0 0,1"),
        ("forward 0 0,1", "forward 3 0,1"), ("forward 1 2", "forward 3 0,1"), ("forward 3 0,1", "forward 4 3,5"),
        ("forward 5 4", "forward 4 3,5"), ("forward 4 3,5", "seal root 2:10,4:40"),
    ):  # fmt: skip
        assert calls.index(first) < calls.index(then)
    assert place.seen.aggregated is not None
    assert place.seen.aggregated.hops == {index: Hop(100, index) for index in range(6)}


async def test_a_flat_round_is_only_folded() -> None:
    place = Place()
    await place.seal(leaf("root", 0, 1))
    assert place.aggregators.calls == ["seal root 0:10,1:10"]


async def test_a_tier_without_updates_is_left_out_and_a_junction_of_such_too() -> None:
    place = Place()
    inner = junction(3, t0=leaf(0, 0, listed=False), t1=leaf(1, 1, listed=False))
    outer = junction(5, t4=leaf(4, 3), t6=leaf(6, 4, listed=False))
    await place.seal(junction("root", t2=leaf(2, 2), t3=inner, t5=outer))
    assert sorted(place.aggregators.calls) == sorted(
        ["open root", "open 5", "forward 2 2", "forward 4 3", "forward 5 4", "seal root 2:10,5:10"]
    )


async def test_a_tier_that_is_away_is_asked_again_and_holds_up_nobody_else() -> None:
    place = Place()
    place.aggregators.failures["forward 2 3"] = [UnavailableError("t2 is away")] * 3
    place.aggregators.failures["open 3"] = [UnavailableError("t3 is away")]
    place.aggregators.failures["forward 4 3,5"] = [UnavailableError("t4 is away")]
    place.aggregators.stuck.add("seal root 2:10,4:40")
    with pytest.raises(TimeoutError):
        await place.seal(three_levels())
    calls = place.aggregators.calls
    assert calls.count("forward 2 3") == 4
    assert calls.count("forward 4 3,5") == 2
    assert calls.count("open root") == 1
    # Its own are asked again with a junction: it may have come back without what they had sent.
    assert (calls.count("open 3"), calls.count("forward 0 0,1")) == (3, 2)
    assert place.seen.trouble is not None
    assert "is away" in place.seen.trouble


@pytest.mark.parametrize("error", [CorruptError("does not open"), PreconditionError("not accepted here")])
async def test_what_is_lost_at_any_depth_spoils_the_attempt_at_once(error: CortexError) -> None:
    place = Place()
    place.aggregators.failures["forward 0 0,1"] = [error]
    place.aggregators.stuck |= {"forward 2 3", "forward 5 4"}
    await place.seal(three_levels())
    assert place.seen.spoilt == error.message
    assert place.seen.aggregated is None
    assert "forward 3 0,1" not in place.aggregators.calls
    assert len(asyncio.all_tasks()) == 1, "nothing goes on behind"


async def test_what_can_only_fail_ends_the_job() -> None:
    place = Place()
    place.aggregators.failures["open 3"] = [InvalidArgumentError("impossible")]
    await place.seal(three_levels())
    assert place.seen.fatal == "round 1 cannot be folded: impossible"


async def test_rounds_are_opened_from_above_and_only_workers_seats_are_told() -> None:
    place = Place()
    place.aggregators.failures["open 3"] = [UnavailableError("t3 is away")]
    await place.collect(junction(4, t3=junction(3, t0=leaf(0, 0, 1), t1=leaf(1, 2)), t5=leaf(5, 4)))
    calls = place.aggregators.calls
    assert calls[0] == "open 4"
    assert calls.count("open 3") == 2
    assert min(calls.index("open 0"), calls.index("open 1")) > max(
        i for i, call in enumerate(calls) if call == "open 3"
    )
    assert place.seen.open_seats == {seat: f"w{seat}" for seat in (0, 1, 2, 4)}
    assert place.seen.trouble is None


async def test_a_tier_whose_workers_have_all_been_dropped_is_not_opened() -> None:
    place = Place()
    await place.collect(junction("root", t0=leaf(0, 0), t1=leaf(1)))
    assert place.aggregators.calls == ["open root", "open 0"]
    assert place.seen.open_seats == {0: "w0"}


async def test_a_tier_hears_where_the_one_above_is_before_it_is_asked_again() -> None:
    place = Place()
    place.aggregators.failures["forward 0 0"] = [UnavailableError("nothing answers there")]
    await place.seal(junction("root", t0=leaf(0, 0)))
    assert place.aggregators.calls == ["open root", "forward 0 0", "open 0", "forward 0 0", "seal root 0:10"]


async def test_below_a_junction_that_cannot_be_opened_nothing_is() -> None:
    place = Place()
    place.aggregators.failures["open 3"] = [PreconditionError("a later round is open")]
    await place.collect(junction(3, t0=leaf(0, 0)))
    assert place.aggregators.calls == ["open 3"]
    assert place.seen.fatal == "round 1 cannot be opened: a later round is open"
