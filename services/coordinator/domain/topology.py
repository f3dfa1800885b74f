"""Which aggregator takes a seat's update: the root for all, or its region's, below those around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain.job import Job, Tier, UsedTier
from services.coordinator.domain.regions import around
from services.coordinator.domain.seen import AggregatorView, Hop, World


def tiers_of(job: Job, cohort: Iterable[SeatIndex], root: AggregatorView, world: World) -> tuple[Tier, ...]:
    """A leaf for the seats of each region, in order of their names, then junctions; none in a flat job or in round 0.

    A region keeps the aggregator it had while that lives. One without a live aggregator counts to the nearest region
    around it that has one; if there is none it is served by the root.
    """
    if job.spec.aggregation.topology != "regional" or job.round == 0:
        return ()
    served = _served(job, root, world)
    members: dict[str, list[SeatIndex]] = {}
    for seat in sorted(cohort):
        worker = world.workers.get(job.seats[seat] or NodeName(""))
        region = worker.region if worker else root.region
        home = next((each for each in around(region) if each in served), region)
        members.setdefault(home, []).append(seat)
    leaves = [_tier(region, served.get(region, root), members[region]) for region in sorted(members)]
    return _joined(leaves, served, root)


def _served(job: Job, root: AggregatorView, world: World) -> Mapping[str, AggregatorView]:
    """The aggregator of each region that has a live one."""
    before = {(tier.region, tier.aggregator) for tier in job.tiers}

    def rank(view: AggregatorView) -> tuple[bool, bool, NodeName]:
        return (view.region, view.name) not in before, view.name != root.name, view.name

    served: dict[str, AggregatorView] = {}
    for view in sorted((view for view in world.aggregators.values() if view.is_live), key=rank):
        served.setdefault(view.region, view)
    return served


def _tier(region: str, view: AggregatorView, seats: Sequence[SeatIndex]) -> Tier:
    return Tier(region, view.name, view.address, tuple(seats))


def _joined(leaves: Sequence[Tier], served: Mapping[str, AggregatorView], root: AggregatorView) -> tuple[Tier, ...]:
    """The leaves, then a junction in each region around them that joins two tiers at least; innermost regions first.

    A junction of one tier would only be another hop, and so would one beside the root.
    """
    tiers = list(leaves)
    loose = [index for index, tier in enumerate(tiers) if tier.aggregator != root.name]
    regions = {each for index in loose for each in around(tiers[index].region) if each in served}
    for region in sorted(regions - {root.region}, key=lambda each: (-each.count("."), each)):
        inside = [index for index in loose if region in around(tiers[index].region)]
        if len(inside) < 2:
            continue
        for index in inside:
            tiers[index] = replace(tiers[index], above=len(tiers))
        loose = [index for index in loose if index not in inside] + [len(tiers)]
        tiers.append(_tier(region, served[region], ()))
    return tuple(tiers)


def readers_of(job: Job, tier: int | None) -> tuple[NodeName, ...]:
    """Who may download versions at the aggregator of a tier, or the root, without uploading to its round.

    At the root that is every other seat's holder: one that missed the opening of a round is sent there to evaluate, and
    the root has the versions of an ended job. At a junction it is who uploads to the same aggregator's leaf.
    """
    if tier is None:
        uploading = {name for seat, name in job.members.items() if job.tier_of(seat) is None}
        return tuple(sorted({name for name in job.seats if name is not None} - uploading))
    if not job.below(tier):
        return ()
    here = {seat for each in job.tiers if each.aggregator == job.tiers[tier].aggregator for seat in each.seats}
    return tuple(sorted(name for seat, name in job.members.items() if seat in here))


def lost_tier(job: Job, world: World) -> Tier | None:
    """A tier whose aggregator is gone. Without the root no move helps: the versions are there."""
    if job.aggregator is not None and world.is_gone(job.aggregator):
        return None
    return next((tier for tier in job.tiers if world.is_gone(tier.aggregator)), None)


def is_cut_off(job: Job, seat: SeatIndex, world: World) -> bool:
    """Whether an aggregator between a seat's worker and the root is gone."""
    tier = job.tier_of(seat)
    while tier is not None:
        if world.is_gone(job.tiers[tier].aggregator):
            return True
        tier = job.tiers[tier].above
    return False


def with_used(job: Job) -> tuple[UsedTier, ...]:
    """Every tier there ever was, the present ones included."""
    now = [UsedTier(job.transfer_id(index), tier.aggregator, tier.address) for index, tier in enumerate(job.tiers)]
    known = {(each.transfer_id, each.aggregator) for each in job.used}
    return (*job.used, *(each for each in now if (each.transfer_id, each.aggregator) not in known))


def bytes_between_regions(job: Job, hops: Mapping[int, Hop], world: World) -> int:
    """Payload of the round, up and down, that crossed from one region to another; each hop counts.

    Args:
        job: Sealed, its contributions with the workers' reports.
        hops: What went between each tier and those above it.
        world: Knows the regions.
    """
    root = world.aggregators.get(job.aggregator or NodeName(""))
    regions: dict[int | None, str] = {index: _region_of(tier, world) for index, tier in enumerate(job.tiers)}
    regions[None] = root.region if root else ""
    total = 0
    for index, hop in hops.items():
        total += hop.up_bytes if regions[index] != regions[job.tiers[index].above] else 0
        total += hop.down_bytes if regions[index] != regions[_source(job, index)] else 0
    uploads = {seat: index for index, tier in enumerate(job.tiers) for seat in tier.seats}
    for entry in job.sealed:
        worker = world.workers.get(entry.worker)
        if worker is not None and worker.region != regions[uploads.get(entry.seat)]:
            total += entry.size_bytes + (entry.trained.bytes_down if entry.trained else 0)
    return total


def _source(job: Job, tier: int) -> int | None:
    """Where a tier's aggregator has versions from: the nearest tier above it that is not its own, or the root."""
    above = job.tiers[tier].above
    while above is not None and job.tiers[above].aggregator == job.tiers[tier].aggregator:
        above = job.tiers[above].above
    return above


def _region_of(tier: Tier, world: World) -> str:
    view = world.aggregators.get(tier.aggregator)
    return view.region if view else tier.region
