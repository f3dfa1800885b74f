"""Who may work for a job, and who is chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

from cortex_common.errors import Violation
from cortex_common.ids import NodeName
from cortex_common.job.spec import JobSpec
from services.coordinator.domain.job import Job
from services.coordinator.domain.regions import around
from services.coordinator.domain.seen import AggregatorView, Dataset, Rules, WorkerView, World


def misfit(worker: WorkerView, spec: JobSpec) -> str | None:
    """Why a worker cannot serve a job; None if it can. Test data are not needed: others of the job may have them."""
    placement = spec.placement
    if placement.regions and worker.region not in placement.regions:
        return f"region {worker.region} is not in placement.regions"
    if placement.require_gpu and not worker.gpus:
        return "has no GPU (placement.require_gpu)"
    if worker.memory_bytes < placement.min_memory:
        return f"has {worker.memory_bytes} bytes of memory (placement.min_memory is {placement.min_memory})"
    if not spec.data.sealed_digest and spec.data.train not in worker.datasets:
        return f"has no dataset {spec.data.train}"
    return None


def can_evaluate(worker: WorkerView, spec: JobSpec) -> bool:
    """Whether a worker has what a job's versions are tested with."""
    return spec.data.test is None or spec.data.test in worker.datasets


def no_evaluator(seated: Iterable[WorkerView], spec: JobSpec) -> str | None:
    """Why none of these workers can evaluate; None if one can, or may: discovery has not told of it yet."""
    among = list(seated)
    if spec.data.test is None or any(can_evaluate(worker, spec) or not worker.is_known for worker in among):
        return None
    return f"none of {len(among)} {_workers(len(among))} has dataset {spec.data.test} to evaluate with (data.test)"


def admission(spec: JobSpec, world: World, built_in: Mapping[str, Dataset]) -> list[Violation]:
    """What makes a job impossible in this network as it is now: known at submission, so said at submission.

    Args:
        spec: The job.
        world: Everybody seen.
        built_in: Datasets every installation knows, by name, and the sealed ones that the job may use.
    """
    datasets = dict(built_in)
    for worker in world.workers.values():
        datasets.update(worker.datasets)
    wrong: list[Violation] = []
    for key, name in (("data.train", spec.data.train), ("data.test", spec.data.test)):
        if name is not None:
            wrong += _dataset_mistakes(key, name, spec, datasets)
    known = [worker for worker in world.workers.values() if worker.is_known]
    if not wrong and known:
        reasons = Counter(misfit(worker, spec) for worker in known)
        if None not in reasons:
            told = "; ".join(f"{count} {_workers(count)}: {reason}" for reason, count in reasons.most_common(4))
            wrong.append(Violation("placement", f"none of {len(known)} workers fits ({told})"))
        elif (reason := no_evaluator((worker for worker in known if misfit(worker, spec) is None), spec)) is not None:
            wrong.append(Violation("placement", reason))
    return wrong


def _workers(count: int) -> str:
    return "worker" if count == 1 else "workers"


def _dataset_mistakes(key: str, name: str, spec: JobSpec, datasets: Mapping[str, Dataset]) -> Iterable[Violation]:
    dataset = datasets.get(name)
    if dataset is None:
        yield Violation(key, f"{name!r} given; no node has such a dataset; known: {', '.join(sorted(datasets))}")
        return
    if dataset.shards is not None and spec.placement.workers > dataset.shards:
        given = spec.placement.workers
        yield Violation(
            "placement.workers", f"{given} given; {name} has {dataset.shards} shards, allowed: up to as many"
        )
    if dataset.elements != spec.model.input_dim:
        given = spec.model.input_dim
        yield Violation("model.input_dim", f"{given} given; inputs of {name} have {dataset.elements} values")
    if dataset.classes > spec.model.output_dim:
        given = spec.model.output_dim
        yield Violation(
            "model.output_dim", f"{given} given; {name} has {dataset.classes} classes, allowed: as many or more"
        )


def fill_seats(job: Job, world: World, rules: Rules, now_s: float) -> tuple[NodeName | None, ...]:
    """Keep every seat whose worker lives, give the others to the best of the free workers that fit, in order of names.

    So the same workers take the same seats whatever they had to do besides; a regional job's sums are rounded alike.
    A seat of partition `local` stays with its worker: the data cannot move.
    """
    count = job.spec.placement.workers
    seats = list(job.seats) or [None] * count
    for index, name in enumerate(seats):
        if name is not None and not _stays(name, job, world, rules, now_s):
            seats[index] = None
    best = islice(spares(job, world, frozenset(name for name in seats if name), rules, now_s), seats.count(None))
    newcomers = iter(sorted(best))
    return tuple(name if name is not None else next(newcomers, None) for name in seats)


def _stays(name: NodeName, job: Job, world: World, rules: Rules, now_s: float) -> bool:
    if job.round > 0 and job.spec.data.partition.scheme == "local":
        return True
    if not world.is_willing(name):
        return False
    worker = world.workers.get(name)
    return worker is not None and worker.is_live(now_s, rules.lease_s)


def spares(job: Job, world: World, seated: frozenset[NodeName], rules: Rules, now_s: float) -> Iterator[NodeName]:
    """Free workers that fit and hold no seat, best first.

    Those that can evaluate too, then GPUs, then idle processors, then by name.
    """
    free = [
        worker
        for worker in world.workers.values()
        if worker.name not in seated
        and worker.name not in world.taken
        and world.is_willing(worker.name)
        and worker.lost_since_s is None
        and not worker.is_suspect
        and worker.is_live(now_s, rules.lease_s)
        and misfit(worker, job.spec) is None
    ]

    def rank(worker: WorkerView) -> tuple[bool, int, int, NodeName]:
        return not can_evaluate(worker, job.spec), -worker.gpus, round(worker.cpu_utilisation * 2), worker.name

    return iter([worker.name for worker in sorted(free, key=rank)])


def choose_aggregator(
    seats: Iterable[NodeName | None], world: World, *, above_regions: bool = False
) -> AggregatorView | None:
    """A live aggregator, in the region with most seats if there is one.

    Args:
        seats: Who holds them.
        world: Who is there.
        above_regions: It sums up what the regions' own have summed; then one of a region without seats is better, if
            there is one: it has nothing else to do. Best is one that all seats' regions lie in, then one where none
            does.
    """
    regions = Counter(world.workers[name].region for name in seats if name in world.workers and name is not None)
    live = [aggregator for aggregator in world.aggregators.values() if aggregator.is_live]
    if above_regions:
        return min(live, key=partial(_rank_above, regions), default=None)
    return min(live, key=lambda view: (-regions[view.region], view.name), default=None)


def _rank_above(regions: Counter[str], view: AggregatorView) -> tuple[bool, bool, int, NodeName]:
    """How an aggregator does as the root of regions with so many seats each; the least does best."""
    inside = sum(count for region, count in regions.items() if view.region in around(region))
    is_around_all = inside == regions.total()
    is_busy = regions[view.region] > 0 or (inside > 0 and not is_around_all)
    return is_busy, not is_around_all, -inside, view.name
