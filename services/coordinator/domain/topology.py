"""Which aggregator takes a seat's update: the root for all, or each region's own with the root above them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cortex_common.ids import NodeName, SeatIndex
from services.coordinator.domain.job import Job, Tier, UsedTier
from services.coordinator.domain.seen import AggregatorView, World


def tiers_of(job: Job, cohort: Iterable[SeatIndex], root: AggregatorView, world: World) -> tuple[Tier, ...]:
    """One tier a region, in order of their names; none in a flat job or in round 0.

    A region keeps the aggregator it had while that lives; one without a live aggregator is served by the root.
    """
    if job.spec.aggregation.topology != "regional" or job.round == 0:
        return ()
    members: dict[str, list[SeatIndex]] = {}
    for seat in sorted(cohort):
        worker = world.workers.get(job.seats[seat] or NodeName(""))
        members.setdefault(worker.region if worker else root.region, []).append(seat)
    return tuple(_tier(job, region, tuple(members[region]), root, world) for region in sorted(members))


def _tier(job: Job, region: str, seats: tuple[SeatIndex, ...], root: AggregatorView, world: World) -> Tier:
    live = [view for view in world.aggregators.values() if view.is_live and view.region == region]
    before = {tier.aggregator for tier in job.tiers if tier.region == region}
    chosen = min(live, key=lambda view: (view.name not in before, view.name != root.name, view.name), default=root)
    return Tier(region, chosen.name, chosen.address, seats)


def readers_of(job: Job, tier: int | None) -> tuple[NodeName, ...]:
    """Who may download versions at the aggregator of a tier, or the root, without uploading there.

    At the root that is every other seat's holder: one that missed the opening of a round is sent there to evaluate, and
    the root has the versions of an ended job.
    """
    if tier is not None:
        return ()
    uploading = {name for seat, name in job.members.items() if job.tier_of(seat) is None}
    return tuple(sorted({name for name in job.seats if name is not None} - uploading))


def lost_tier(job: Job, world: World) -> Tier | None:
    """A tier whose aggregator is gone. Without the root no move helps: the versions are there."""
    root = world.aggregators.get(job.aggregator or NodeName(""))
    if root is not None and not root.is_live:
        return None
    for tier in job.tiers:
        view = world.aggregators.get(tier.aggregator)
        if view is not None and not view.is_live:
            return tier
    return None


def with_used(job: Job) -> tuple[UsedTier, ...]:
    """Every tier there ever was, the present ones included."""
    now = [UsedTier(job.transfer_id(index), tier.aggregator, tier.address) for index, tier in enumerate(job.tiers)]
    known = {(each.transfer_id, each.aggregator) for each in job.used}
    return (*job.used, *(each for each in now if (each.transfer_id, each.aggregator) not in known))


def bytes_between_regions(job: Job, crossed: Mapping[int, int], world: World) -> int:
    """Payload of the round, up and down, that crossed from one region to another.

    Args:
        job: Sealed, its contributions with the workers' reports.
        crossed: Bytes that went between each tier and the root.
        world: Knows the regions.
    """
    root = world.aggregators.get(job.aggregator or NodeName(""))
    home = root.region if root else ""
    if job.tiers:
        away = [index for index, tier in enumerate(job.tiers) if _region_of(tier, world) != home]
        return sum(crossed.get(index, 0) for index in away)
    total = 0
    for entry in job.sealed:
        worker = world.workers.get(entry.worker)
        if worker is not None and worker.region != home:
            total += entry.size_bytes + (entry.trained.bytes_down if entry.trained else 0)
    return total


def _region_of(tier: Tier, world: World) -> str:
    view = world.aggregators.get(tier.aggregator)
    return view.region if view else tier.region
