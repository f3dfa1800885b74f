"""Jobs and worlds to decide about."""

from __future__ import annotations

from dataclasses import replace

from cortex_common.ids import JobId, NodeName, SeatIndex, Sha256Hex
from cortex_common.job.parse import parse_job
from services.coordinator.domain.advance import Now
from services.coordinator.domain.job import Contribution, Job, Stage, Trained, Version
from services.coordinator.domain.seen import (
    AggregatedVersion,
    AggregatorView,
    Dataset,
    Rules,
    Seen,
    SliceScore,
    WorkerView,
    World,
)

RULES = Rules()
DIGITS = {"digits": Dataset(64, 10), "digits-test": Dataset(64, 10)}


def document(**sections: object) -> dict[str, object]:
    base: dict[str, object] = {
        "model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10},
        "data": {"train": "digits", "test": "digits-test"},
        "training": {"rounds": 2},
        "placement": {"workers": 3},
    }
    return base | sections


def new_job(**sections: object) -> Job:
    return Job(JobId("j1"), parse_job(document(**sections)), "ann", 100.0)


def worker(name: str, **changes: object) -> WorkerView:
    return replace(WorkerView(NodeName(name), "eu", slots=1, memory_bytes=1 << 30, datasets=DIGITS), **changes)  # type: ignore[arg-type]


def world(*names: str, **lost_since_s: float) -> World:
    workers = {NodeName(name): worker(name, lost_since_s=lost_since_s.get(name)) for name in names}
    aggregators = {NodeName("agg"): AggregatorView(NodeName("agg"), "eu", "127.0.0.1:1", is_live=True)}
    return World(workers, aggregators)


def at(seconds: float) -> Now:
    return Now(1000.0 + seconds, 100.0 + seconds)


def seen(**facts: object) -> Seen:
    return replace(Seen(since_s=1000.0), **facts)  # type: ignore[arg-type]


def collecting(*names: str, **sections: object) -> Job:
    """A job in round 1 whose cohort is `names`."""
    job = new_job(placement={"workers": len(names)}, **sections)
    return replace(
        job,
        stage=Stage.COLLECTING,
        round=1,
        seats=tuple(NodeName(name) for name in names),
        cohort=tuple(SeatIndex(index) for index in range(len(names))),
        aggregator=NodeName("agg"),
        aggregator_address="127.0.0.1:1",
        version=version(0),
        opened_s=100.0,
        started_s=100.0,
    )


def version(number: int) -> Version:
    return Version(number, Sha256Hex(f"{number:064x}"), Sha256Hex("m" * 64), 2410, 9640, {}, 100.0)


def update(seat: int, name: str, weight: float = 10.0) -> Contribution:
    return Contribution(SeatIndex(seat), NodeName(name), Sha256Hex(f"{seat:064x}"), weight, 100)


def trained(name: str, examples: int = 10, **metrics: float) -> Trained:
    return Trained(NodeName(name), 1.0, 0.5, examples, 5, metrics, 50)


def accepted(job: Job, *seats: int, at_s: float = 1001.0) -> Seen:
    """Updates of these seats are in, with their reports."""
    who = {SeatIndex(seat): job.members[SeatIndex(seat)] for seat in seats}
    return seen(
        open_seats=job.members,
        accepted={seat: update(seat, name) for seat, name in who.items()},
        accepted_at=dict.fromkeys(who, at_s),
        trained={seat: trained(name, train_loss=float(seat)) for seat, name in who.items()},
    )


AGGREGATED = AggregatedVersion("a" * 64, "m" * 64, 2410, 9640, 1.0)


def scores(*correct: int) -> dict[int, SliceScore]:
    return {index: SliceScore(100, 50.0, value) for index, value in enumerate(correct)}
