"""One job in the coordinator's memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cortex_common.ids import NodeName, SeatIndex
from cortex_common.job.site_policy import Refusal
from cortex_common.logging import get_logger
from services.coordinator.attendance import Line
from services.coordinator.domain.assignments import rests
from services.coordinator.domain.job import Job, Stage
from services.coordinator.domain.seen import Seen
from services.coordinator.orders import Order
from services.coordinator.signal import Signal

log = get_logger(__name__)
LinkKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class SiteRefused:
    """What a worker has said on its line: its site's policy forbids the job. Holds as long as that line."""

    rules: tuple[Refusal, ...]
    line: Line


@dataclass(slots=True)
class Tracked:
    """The durable job, what was seen of its present stage, and the link that works for it."""

    job: Job
    seen: Seen
    changed: Signal = field(default_factory=Signal)
    link: asyncio.Task[None] | None = None
    link_key: LinkKey | None = None
    resealing: asyncio.Task[None] | None = None
    pruned_s: float = -math.inf
    given: dict[NodeName, Order] = field(default_factory=dict)
    refusals: dict[NodeName, SiteRefused] = field(default_factory=dict)

    def replace_job(self, job: Job, now_s: float) -> None:
        """Take the job's next state; observations about a stage end with it."""
        before, self.job = self.job, job
        if is_new_stage(before, job):
            self.seen = Seen(since_s=now_s)
        self.changed.notify()

    def wait_for(self, what: str | None, now_s: float) -> None:
        """Note what keeps the next round from being opened. That time is not spent on waiting for workers."""
        if what != self.seen.trouble:
            log.warning("round_waits", job_id=self.job.id, round=self.job.round, reason=what)
            self.changed.notify()
        self.seen = replace(self.seen, trouble=what, since_s=now_s)

    def wait_for_others(self) -> None:
        """Note that the next round could not be opened anyway: there are not enough workers for it."""
        if self.job.stage is Stage.GATHERING and self.seen.trouble is not None:
            self.seen = replace(self.seen, trouble=None)
            self.changed.notify()

    def wanted_link(self) -> LinkKey | None:
        """Identifies the link the job needs now; None for none."""
        job = self.job
        if job.stage is Stage.COLLECTING:
            return (job.stage, job.round, job.attempt, tuple(sorted(job.members.items())))
        if job.stage is Stage.SEALED:
            return (job.stage, job.round, job.attempt)
        return (job.stage,) if job.stage.is_terminal and not job.cleaned else None

    def resting(self, worker: NodeName, due: Order) -> Order:
        """What to give a worker: what is due, or still its last order while it rests between two rounds."""
        last = self.given.get(worker)
        if last is not None and rests(self.job, worker, last.assignment, due.assignment):
            return last
        self.given[worker] = due
        return due

    def refuse(self, worker: NodeName, rules: tuple[Refusal, ...], line: Line) -> None:
        """Note what a worker's site has said to the job."""
        self.refusals[worker] = SiteRefused(rules, line)
        log.warning("job_refused", job_id=self.job.id, worker=worker, rules=[str(rule) for rule in rules])
        self.changed.notify()

    def refused(self, lines: Mapping[NodeName, Line]) -> dict[NodeName, tuple[Refusal, ...]]:
        """Who refuses the job now: a worker that attends anew is asked anew, its site's policy may have changed."""
        return {name: said.rules for name, said in self.refusals.items() if lines.get(name) is said.line}

    def seat_of(self, worker: str) -> SeatIndex | None:
        """The seat a worker holds."""
        for index, name in enumerate(self.job.seats):
            if name == worker:
                return SeatIndex(index)
        return None


def is_new_stage(before: Job, after: Job) -> bool:
    """Whether what was seen before no longer counts."""
    return (before.stage, before.round, before.attempt) != (after.stage, after.round, after.attempt)
