"""Who forwards to whom: regions in regions, junctions between them, and what crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain.advance import advance
from services.coordinator.domain.assignments import Work, assignments
from services.coordinator.domain.job import Job, Stage, Tier
from services.coordinator.domain.placement import choose_aggregator
from services.coordinator.domain.regions import around
from services.coordinator.domain.seen import AggregatorView, Hop, World
from services.coordinator.domain.topology import bytes_between_regions, lost_tier, readers_of, tiers_of, with_used
from tests.unit.coordinator.jobs import RULES, at, collecting, seen, trained, update, worker


def aggregator(region: str, name: str = "", *, is_live: bool = True) -> AggregatorView:
    name = name or f"agg-{region}"
    return AggregatorView(NodeName(name), region, f"{name}:1", is_live)


def network(workers: str, aggregators: str) -> World:
    """Workers w0, w1, … in these regions, and an aggregator in each of those; `-eu` is one that is gone."""
    seated = {NodeName(f"w{index}"): worker(f"w{index}", region=region) for index, region in enumerate(workers.split())}
    views = [aggregator(region.lstrip("-"), is_live=not region.startswith("-")) for region in aggregators.split()]
    return World(seated, {view.name: view for view in views})


def arranged(workers: str, aggregators: str, root: str = "global") -> Job:
    """A regional job with a seat for each worker, its root in that region, and its tiers."""
    world = network(workers, aggregators)
    view = world.aggregators[NodeName(f"agg-{root}")]
    job = collecting(*world.workers, aggregation={"topology": "regional"})
    job = replace(job, aggregator=view.name, aggregator_address=view.address)
    return replace(job, tiers=tiers_of(job, job.cohort, view, world))


def tree(job: Job, above: int | None = None) -> dict[str, object]:
    """Seats of leaves, and what is below junctions, each under its region at its aggregator's."""
    shown: dict[str, object] = {}
    for index in job.below(above):
        tier = job.tiers[index]
        name = tier.region if tier.aggregator == f"agg-{tier.region}" else f"{tier.region} at {tier.aggregator}"
        shown[f"{name} (own)" if name in shown else name] = tree(job, index) or tier.seats
    return shown


def test_a_region_lies_in_those_whose_names_it_begins_with() -> None:
    assert around("eu.fr.paris") == ("eu.fr.paris", "eu.fr", "eu")
    assert around("eu") == ("eu",)
    assert around("eu-west.1") == ("eu-west.1", "eu-west")
    assert "eu" not in around("europe.paris")
    # Allowed ever since; no region is called "eu.".
    assert around("eu..paris")[-1] == "eu"


@pytest.mark.parametrize(
    ("workers", "aggregators", "expected"),
    [
        pytest.param("eu us eu", "eu us global", {"eu": (0, 2), "us": (1,)}, id="one level, as ever"),
        pytest.param("eu us", "us global", {"eu at agg-global": (0,), "us": (1,)}, id="served by the root"),
        pytest.param(
            "eu.paris eu.lyon us",
            "eu eu.paris eu.lyon us global",
            {"eu": {"eu.lyon": (1,), "eu.paris": (0,)}, "us": (2,)},
            id="a junction without seats",
        ),
        pytest.param(
            "eu eu.paris us",
            "eu eu.paris us global",
            {"eu": {"eu": (0,), "eu.paris": (1,)}, "us": (2,)},
            id="a junction with workers of its own",
        ),
        pytest.param("eu.paris us", "eu eu.paris us global", {"eu.paris": (0,), "us": (1,)}, id="no junction of one"),
        pytest.param(
            "eu.paris eu.lyon us", "eu.paris eu.lyon us global",
            {"eu.lyon": (1,), "eu.paris": (0,), "us": (2,)}, id="no aggregator between",
        ),
        pytest.param(
            "eu.fr.paris eu.fr.lyon us", "eu eu.fr.paris eu.fr.lyon us global",
            {"eu": {"eu.fr.lyon": (1,), "eu.fr.paris": (0,)}, "us": (2,)}, id="a missing level",
        ),
        pytest.param("eu.paris eu us", "eu us global", {"eu": (0, 1), "us": (2,)}, id="counts to the region around it"),
        pytest.param(
            "eu.fr.paris eu.fr.lyon eu.de eu.de us", "eu eu.fr eu.fr.paris eu.fr.lyon eu.de us global",
            {"eu": {"eu.de": (2, 3), "eu.fr": {"eu.fr.lyon": (1,), "eu.fr.paris": (0,)}}, "us": (4,)},
            id="three levels",
        ),
        pytest.param(
            "eu.fr.paris eu.fr.lyon us", "eu eu.fr eu.fr.paris eu.fr.lyon us global",
            {"eu.fr": {"eu.fr.lyon": (1,), "eu.fr.paris": (0,)}, "us": (2,)},
            id="the outer junction would be one of one",
        ),
    ],
)  # fmt: skip
def test_tiers_forward_to_the_nearest_region_around_them(
    workers: str, aggregators: str, expected: dict[str, object]
) -> None:
    assert tree(arranged(workers, aggregators)) == expected


def test_leaves_have_the_places_they_would_have_without_junctions() -> None:
    """Their job ids and the order in which a flat network of regions adds them up stay."""
    job = arranged("eu.paris eu.lyon us", "eu eu.paris eu.lyon us global")
    assert [(tier.region, tier.above) for tier in job.tiers] == [
        ("eu.lyon", 3), ("eu.paris", 3), ("us", None), ("eu", None)
    ]  # fmt: skip
    assert [job.transfer_id(index) for index in job.below(3)] == ["j1-t0", "j1-t1"]
    assert [job.tier_of(SeatIndex(seat)) for seat in range(3)] == [1, 0, 2]


def test_what_is_at_the_root_or_beside_it_needs_no_junction() -> None:
    job = arranged("eu.paris eu.lyon eu us", "eu eu.paris eu.lyon us", root="eu")
    assert tree(job) == {"eu": (2,), "eu.lyon": (1,), "eu.paris": (0,), "us": (3,)}
    world = network("eu.paris eu.lyon", "eu eu.paris eu.lyon")
    other = aggregator("eu", "a-second")
    world = replace(world, aggregators={**world.aggregators, other.name: other})
    before = replace(job, tiers=(Tier("eu", other.name, other.address, ()),))
    beside = tiers_of(before, before.cohort[:2], world.aggregators[NodeName("agg-eu")], world)
    assert [(tier.region, tier.above) for tier in beside] == [("eu.lyon", None), ("eu.paris", None)]


def test_a_flat_job_and_round_0_have_no_tiers() -> None:
    world = network("eu.paris eu.lyon", "eu eu.paris eu.lyon global")
    root = world.aggregators[NodeName("agg-global")]
    regional = collecting("w0", "w1", aggregation={"topology": "regional"})
    assert tiers_of(collecting("w0", "w1"), (SeatIndex(0),), root, world) == ()
    assert tiers_of(replace(regional, round=0), (SeatIndex(0),), root, world) == ()


def test_a_region_keeps_its_junction_while_that_lives() -> None:
    world = network("eu.paris eu.lyon", "eu eu.paris eu.lyon global")
    second = aggregator("eu", "a-second")
    world = replace(world, aggregators={**world.aggregators, second.name: second})
    job = arranged("eu.paris eu.lyon", "eu eu.paris eu.lyon global")
    root = world.aggregators[NodeName("agg-global")]
    assert tiers_of(job, job.cohort, root, world) == job.tiers
    fresh = tiers_of(replace(job, tiers=()), job.cohort, root, world)
    assert fresh[2].aggregator == second.name, "by name, at first"


def test_when_a_junction_is_gone_the_round_is_collected_again_around_it() -> None:
    job = arranged("eu.paris eu.lyon us", "eu eu.paris eu.lyon us global")
    gone = network("eu.paris eu.lyon us", "-eu eu.paris eu.lyon us global")
    lost = lost_tier(job, gone)
    assert lost == job.tiers[3]
    for stage in (Stage.COLLECTING, Stage.SEALED):
        verdict = advance(replace(job, stage=stage), seen(), gone, RULES, at(1))
        assert (verdict.job.stage, verdict.job.attempt, verdict.job.moves) == (Stage.GATHERING, 2, 1)
        assert verdict.notes[0].name == "region_moved"
    again = advance(verdict.job, seen(), gone, RULES, at(1)).job
    assert again.stage is Stage.COLLECTING
    assert tree(again) == {"eu.lyon": (1,), "eu.paris": (0,), "us": (2,)}
    assert {each.transfer_id for each in with_used(replace(again, used=with_used(job)))} == {
        "j1-t0", "j1-t1", "j1-t2", "j1-t3"
    }  # fmt: skip


def test_a_lost_junction_leaves_its_regions_to_the_next_one_out() -> None:
    workers, aggregators = "eu.fr.paris eu.fr.lyon eu.de us", "eu {}eu.fr eu.fr.paris eu.fr.lyon eu.de us global"
    job = arranged(workers, aggregators.format(""))
    assert tree(job)["eu"] == {"eu.de": (2,), "eu.fr": {"eu.fr.lyon": (1,), "eu.fr.paris": (0,)}}
    job = arranged(workers, aggregators.format("-"))
    assert tree(job)["eu"] == {"eu.de": (2,), "eu.fr.lyon": (1,), "eu.fr.paris": (0,)}


def test_versions_are_tested_by_those_whom_they_can_reach() -> None:
    job = replace(arranged("eu.paris eu.lyon us", "eu eu.paris eu.lyon us global"), stage=Stage.TESTING)

    def evaluating(aggregators: str) -> dict[str, tuple[int, ...]]:
        world = network("eu.paris eu.lyon us", aggregators)
        given = assignments(job, seen(), world, RULES, 1000.0)
        return {name: order.slices for name, order in given.items() if order.work is Work.EVALUATE}

    assert evaluating("eu eu.paris eu.lyon us global") == {"w0": (0,), "w1": (1,), "w2": (2,)}
    assert evaluating("eu -eu.paris eu.lyon us global") == {"w1": (0, 1), "w2": (2,)}
    assert evaluating("-eu eu.paris eu.lyon us global") == {"w2": (0, 1, 2)}
    assert evaluating("-eu eu.paris eu.lyon -us global") == {"w0": (0,), "w1": (1,), "w2": (2,)}, "they come back"


def test_junctions_are_tiers_to_be_cleaned_up_too() -> None:
    job = arranged("eu.paris eu.lyon us", "eu eu.paris eu.lyon us global")
    assert ("j1-t3", "agg-eu") in {(each.transfer_id, each.aggregator) for each in with_used(job)}


def test_who_uploads_at_a_junctions_aggregator_may_download_there() -> None:
    job = arranged("eu eu.paris us", "eu eu.paris us global")
    junction = next(index for index in range(len(job.tiers)) if job.below(index))
    assert job.tiers[junction].region == "eu"
    assert readers_of(job, junction) == ("w0",)
    assert [readers_of(job, index) for index in job.below(junction)] == [(), ()]


def test_every_hop_from_one_region_to_another_counts() -> None:
    world = network("eu eu.paris us", "eu eu.paris us global")
    job = arranged("eu eu.paris us", "eu eu.paris us global")
    names = [f"{tier.region}{'+' if job.below(index) else ''}" for index, tier in enumerate(job.tiers)]
    assert names == ["eu", "eu.paris", "us", "eu+"]
    sealed = [replace(update(seat, f"w{seat}"), trained=trained(f"w{seat}")) for seat in range(3)]
    job = replace(job, sealed=tuple(sealed))

    def crossed(**hops: tuple[int, int]) -> int:
        at_tier = {names.index(name.replace("_", ".").replace("P", "+")): Hop(*hop) for name, hop in hops.items()}
        return bytes_between_regions(job, at_tier, world)

    assert crossed(eu=(1, 0)) == 0, "to the junction beside it"
    assert crossed(eu=(0, 10)) == 10, "from above the junction beside it: whichever of the two accounts the download"
    assert crossed(eu_paris=(100, 1000)) == 1100
    assert crossed(eu=(1, 0), eu_paris=(2, 20), us=(3, 30), euP=(4, 40)) == 2 + 20 + 3 + 30 + 4 + 40


def test_what_workers_exchange_with_another_regions_aggregator_counts() -> None:
    world = network("eu.paris eu us", "eu us global")
    job = arranged("eu.paris eu us", "eu us global")
    sealed = [replace(update(seat, f"w{seat}"), trained=trained(f"w{seat}")) for seat in range(3)]
    job = replace(job, sealed=tuple(sealed))
    assert bytes_between_regions(job, {0: Hop(7, 5)}, world) == 100 + 50 + 7 + 5
    flat = replace(job, tiers=())
    assert bytes_between_regions(flat, {}, world) == 3 * 150


@pytest.mark.parametrize(
    ("workers", "aggregators", "root"),
    [
        ("eu.paris eu.lyon us", "eu eu.paris eu.lyon us global", "global"),
        ("eu.paris eu.lyon", "eu eu.paris eu.lyon a", "eu"),
        ("eu.paris eu.lyon us", "eu.paris eu.lyon eu us", "eu"),
        ("eu us us", "eu us global", "global"),
        ("eu us us", "eu us", "us"),
        ("eu eu.paris us", "eu eu.paris us", "eu"),
    ],
)
def test_the_root_is_around_all_regions_or_around_none(workers: str, aggregators: str, root: str) -> None:
    world = network(workers, aggregators)
    chosen = choose_aggregator(list(world.workers), world, above_regions=True)
    assert chosen is not None
    assert chosen.region == root
