"""One job on this worker: its assignments one after another, each done once and reported until heard."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from cortex_common.clock import Clock
from cortex_common.errors import (
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from cortex_common.logging import get_logger
from cortex_common.network.messages import TrainingMetrics, WorkResult
from cortex_common.network.work import Assignment, Failed, WorkKey
from cortex_common.rpc.retry import backoff
from services.worker import metrics
from services.worker.domain import Finished, Held, Outcome, forget_old, is_finished, next_work
from services.worker.execution import Execution, Surroundings
from services.worker.workbench import Workbench

_log = get_logger(__name__)

_ACTIVITY_AFTER_S = 0.25
"""Work that is over sooner is over before anybody reads of it."""
_ACTIVITY_EVERY_S = 1.0
# Saying the same again will not help; whatever else goes wrong at the coordinator may pass.
_HOPELESS = (InvalidArgumentError, ForbiddenError, NotFoundError, PreconditionError)


class Reports(Protocol):
    """Takes reports to the coordinator."""

    async def report(self, report: TrainingMetrics | WorkResult, *, is_urgent: bool) -> bool:
        """Deliver one; False when the assignment is no longer wanted.

        Raises:
            CortexError: not delivered.
        """


async def deliver(reports: Reports, report: WorkResult, clock: Clock) -> bool:
    """Report until it is heard; False when the assignment is no longer wanted.

    Raises:
        CortexError: the coordinator refuses it for good.
    """

    async def once() -> bool:
        try:
            return await reports.report(report, is_urgent=True)
        except (UnavailableError, *_HOPELESS):
            raise
        except CortexError as error:
            _log.warning("report_failed", assignment_id=report.place.assignment_id, reason=error.message)
            raise UnavailableError(error.message) from error

    return await backoff(clock)(once)


class JobRunner:
    """Carries out what is wanted of one job.

    Attributes:
        activity: What is being done, in words fit for a status page.
    """

    def __init__(self, bench: Workbench, surroundings: Surroundings, reports: Reports) -> None:
        self._bench = bench
        self._around = surroundings
        self._reports = reports
        self._wanted: list[Assignment] = []
        self._unwanted_ids: set[str] = set()
        self._finished: dict[WorkKey, Finished] = {}
        self._delivered_ids: set[str] = set()
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._activity = ("starting", 0.0, dict[str, float]())
        self._activity_changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def activity(self) -> str:
        """What is being done, in words."""
        name, progress, _ = self._activity
        share = f" ({progress:.0%})" if 0 < progress < 1 else ""
        return f"{self._wanted[0].spec.name if self._wanted else 'job'}: {name}{share}"

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin; goes on until `close`."""
        self._loop = group.create_task(self._run())

    def update(self, wanted: Sequence[Assignment], *, again: bool) -> None:
        """Take the newest list of this job's assignments.

        Args:
            wanted: All of them.
            again: The line to the coordinator is new: what was reported before may have been lost.
        """
        if again:
            # Who called work unwanted may have been a coordinator that had not taken its jobs up yet.
            self._unwanted_ids.clear()
        self._wanted = [each for each in wanted if each.assignment_id not in self._unwanted_ids]
        self._finished = forget_old(self._finished, wanted)
        ids = {each.assignment_id for each in wanted}
        self._unwanted_ids &= ids
        self._delivered_ids &= set() if again else ids
        for assignment_id, task in list(self._deliveries.items()):
            if assignment_id not in ids:
                task.cancel()
        self._changed.set()

    async def close(self) -> None:
        """Stop everything and give the memory back."""
        tasks = [*self._deliveries.values(), *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._bench.close()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            self._deliver_finished()
            assignment = next_work(self._wanted, self._finished)
            if assignment is None:
                await self._changed.wait()
            else:
                await self._carry_out(assignment)

    async def _carry_out(self, assignment: Assignment) -> None:
        """Do one piece of work, unless it stops being wanted."""
        key = assignment.key
        execution = Execution(lambda: self._latest(key) or assignment, self._bench, self._around, self._tell)
        _log.info("work_begun", **_facts(assignment))
        work = asyncio.create_task(execution.run())
        telling = asyncio.create_task(self._tell_coordinator(key))
        try:
            while not work.done() and self._latest(key) is not None:
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait((work, changed), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._changed.clear()
                self._deliver_finished()
        finally:
            telling.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work, telling))
        if work.cancelled():
            _log.info("work_dropped", reason="no longer wanted", **_facts(assignment))
            metrics.OUTCOMES.labels(type(key.work).__name__.lower(), "dropped").inc()
            return
        self._finish(self._latest(key) or assignment, work.result())

    def _finish(self, assignment: Assignment, outcome: Outcome) -> None:
        self._finished[assignment.key] = Finished(assignment.assignment_id, outcome)
        metrics.OUTCOMES.labels(type(assignment.work).__name__.lower(), type(outcome).__name__.lower()).inc()
        if isinstance(outcome, Failed):
            _log.warning("work_failed", reason=outcome.reason, is_permanent=outcome.is_permanent, **_facts(assignment))
        else:
            _log.info("work_done", outcome=type(outcome).__name__.lower(), **_facts(assignment))
        self._tell("waiting", 0.0, {})

    def _deliver_finished(self) -> None:
        """Report every wanted outcome that the coordinator has not heard of under this assignment."""
        for assignment in self._wanted:
            name = assignment.assignment_id
            if name in self._delivered_ids or name in self._deliveries or not is_finished(assignment, self._finished):
                continue
            outcome = self._finished[assignment.key].outcome
            if not isinstance(outcome, Held):
                task = asyncio.create_task(self._deliver(assignment, WorkResult(assignment.place, outcome)))
                self._deliveries[name] = task
                task.add_done_callback(partial(self._delivery_over, name))

    def _delivery_over(self, name: str, _task: asyncio.Task[None]) -> None:
        self._deliveries.pop(name, None)

    async def _deliver(self, assignment: Assignment, result: WorkResult) -> None:
        try:
            wanted = await deliver(self._reports, result, self._around.clock)
        except CortexError as error:
            _log.warning("report_refused", reason=error.message, **_facts(assignment))
            wanted = True
        self._delivered_ids.add(assignment.assignment_id)
        if not wanted:
            self._drop(assignment.assignment_id)

    async def _tell_coordinator(self, key: WorkKey) -> None:
        """Pass on what is being done, about once a second; nobody misses what is lost."""
        await self._around.clock.sleep(_ACTIVITY_AFTER_S)
        while (assignment := self._latest(key)) is not None:
            self._activity_changed.clear()
            try:
                if not await self._reports.report(TrainingMetrics(assignment.place, *self._activity), is_urgent=False):
                    self._drop(assignment.assignment_id)
            except UnavailableError:
                pass
            except CortexError as error:
                _log.warning("activity_refused", reason=error.message, **_facts(assignment))
            await self._around.clock.sleep(_ACTIVITY_EVERY_S)
            await self._activity_changed.wait()

    def _latest(self, key: WorkKey) -> Assignment | None:
        """The assignment as last heard, or None when this work is not wanted any more."""
        return next((each for each in self._wanted if each.key == key), None)

    def _drop(self, assignment_id: str) -> None:
        self._unwanted_ids.add(assignment_id)
        self._wanted = [each for each in self._wanted if each.assignment_id != assignment_id]
        self._changed.set()

    def _tell(self, activity: str, progress: float, figures: Mapping[str, float]) -> None:
        self._activity = (activity, progress, dict(figures))
        self._activity_changed.set()


def _facts(assignment: Assignment) -> dict[str, object]:
    return {
        "job_id": assignment.job_id,
        "round": assignment.round,
        "attempt": assignment.attempt,
        "seat": assignment.seat,
        "work": type(assignment.work).__name__.lower(),
        "assignment_id": assignment.assignment_id,
    }
