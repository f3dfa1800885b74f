"""Fits what the coordinator wants into this worker's slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from cortex_common.errors import CortexError
from cortex_common.ids import JobId
from cortex_common.job.site_policy import Refusal
from cortex_common.logging import get_logger
from cortex_common.network.messages import Assignments, WorkResult
from cortex_common.network.work import Assignment, Failed, Place
from services.worker import metrics
from services.worker.domain import plan_jobs
from services.worker.execution import Surroundings
from services.worker.job_runner import JobRunner, Reports, deliver
from services.worker.settings import WorkerSettings
from services.worker.slots import StartTrainer, TrainerSlot
from services.worker.workbench import Workbench

_log = get_logger(__name__)

Refusals = Callable[[Assignment], Sequence[Refusal]]


class Supervisor:
    """Owns the slots: one job each, with a trainer that is warm before it is needed."""

    def __init__(
        self,
        settings: WorkerSettings,
        surroundings: Surroundings,
        reports: Reports,
        start_trainer: StartTrainer,
        refusals: Refusals = lambda _: (),
    ) -> None:
        """Prepare the slots.

        Args:
            settings: How many, with what.
            surroundings: What work needs.
            reports: Takes outcomes to the coordinator.
            start_trainer: For each slot.
            refusals: The site's rules that keep it from an assignment; asked before anything of the job runs.
        """
        self._settings = settings
        self._around = surroundings
        self._reports = reports
        self._free = [TrainerSlot(start_trainer) for _ in range(settings.slots)]
        self._jobs: dict[JobId, tuple[TrainerSlot, JobRunner]] = {}
        self._wanted: list[Assignment] = []
        self._rules = refusals
        self._unreadable: dict[str, tuple[Place, Failed]] = {}
        self._refused_ids: set[str] = set()
        self._is_new_line = False
        self._changed = asyncio.Event()

    @property
    def free_slots(self) -> int:
        """Places for further jobs."""
        return self._settings.slots - len(self._jobs)

    @property
    def activity(self) -> str:
        """What this worker does, in words fit for a status page."""
        return "; ".join(runner.activity for _, runner in self._jobs.values()) or "idle"

    def take(self, message: Assignments) -> None:
        """The newest list of everything wanted. What was not understood is not the job's fault, and refused."""
        if message.is_first:
            self._refused_ids.clear()
            self._is_new_line = True
        self._wanted = list(message.assignments)
        self._unreadable = {
            each.place.assignment_id: (each.place, Failed(each.reason, False)) for each in message.unreadable
        }
        self._changed.set()

    def recheck(self) -> None:
        """The site's rules have changed: ask again about everything."""
        self._changed.set()

    async def run(self) -> None:
        """Follow what is wanted until cancelled; then end every trainer."""
        metrics.SLOTS.set(self._settings.slots)
        for slot in self._free:
            slot.warm_up()
        try:
            async with asyncio.TaskGroup() as runners:
                while True:
                    await self._changed.wait()
                    self._changed.clear()
                    await self._follow(runners)
        finally:
            await self._close()

    async def _follow(self, runners: asyncio.TaskGroup) -> None:
        again, self._is_new_line = self._is_new_line, False
        refused = dict(self._unreadable)
        wanted = self._admitted(refused)
        plan = plan_jobs(wanted, tuple(self._jobs), self._settings.slots)
        for job in plan.end:
            await self._end(job)
        for job in plan.begin:
            slot = self._free.pop()
            runner = JobRunner(Workbench(slot, self._settings), self._around, self._reports)
            self._jobs[job] = (slot, runner)
            runner.update([each for each in wanted if each.job_id == job], again=True)
            runner.start(runners)
        for job, (_, runner) in self._jobs.items():
            runner.update([each for each in wanted if each.job_id == job], again=again)
        metrics.JOBS.set(len(self._jobs))
        busy = f"no free slot on this worker ({self._settings.slots} of {self._settings.slots} have a job)"
        for assignment in plan.refused:
            refused[assignment.assignment_id] = (assignment.place, Failed(busy, False))
        self._refuse(runners, refused)

    def _admitted(self, refused: dict[str, tuple[Place, Failed]]) -> list[Assignment]:
        """What the site's rules let through; the rest is put among the refused."""
        wanted = []
        for each in self._wanted:
            if rules := tuple(self._rules(each)):
                reason = f"refused by the site's policy: {'; '.join(map(str, rules))}"
                refused[each.assignment_id] = (each.place, Failed(reason[:4096], False, rules))
            else:
                self._refused_ids.discard(each.assignment_id)
                wanted.append(each)
        return wanted

    async def _end(self, job: JobId) -> None:
        """Forget a job; its trainer goes with it, and the next one is started."""
        slot, runner = self._jobs.pop(job)
        await runner.close()
        await slot.clear()
        slot.warm_up()
        self._free.append(slot)
        _log.info("job_left", job_id=job)

    def _refuse(self, tasks: asyncio.TaskGroup, refused: Mapping[str, tuple[Place, Failed]]) -> None:
        for assignment_id, (place, why) in refused.items():
            if assignment_id not in self._refused_ids:
                self._refused_ids.add(assignment_id)
                _log.warning("assignment_refused", assignment_id=assignment_id, reason=why.reason)
                tasks.create_task(self._deliver(WorkResult(place, why)))

    async def _deliver(self, refusal: WorkResult) -> None:
        try:
            await deliver(self._reports, refusal, self._around.clock)
        except CortexError as error:
            _log.warning("report_refused", assignment_id=refusal.place.assignment_id, reason=error.message)

    async def _close(self) -> None:
        for _, runner in self._jobs.values():
            await runner.close()
        for slot in [*self._free, *(slot for slot, _ in self._jobs.values())]:
            await slot.clear()
        self._jobs.clear()
