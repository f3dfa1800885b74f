"""JobCoordinator: runs every job by asking the state machine again whenever something was seen."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cortex_common.clock import Clock
from cortex_common.errors import (
    AlreadyExistsError,
    CorruptError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.job.site_policy import Refusal
from cortex_common.job.spec import JobSpec
from cortex_common.job.status import JobStatus
from cortex_common.logging import get_logger
from services.coordinator.attendance import Attendance
from services.coordinator.datasets import SealedDatasets
from services.coordinator.deployment import ModelDeploymentManager
from services.coordinator.domain.advance import Now, Verdict, advance
from services.coordinator.domain.assignments import assignments
from services.coordinator.domain.explain import waiting_for
from services.coordinator.domain.job import Job, Note, Stage
from services.coordinator.domain.placement import admission
from services.coordinator.domain.reach import EVERYTHING, Caller, Reach
from services.coordinator.domain.seen import Dataset, Rules, Seen, World
from services.coordinator.keys import JobKeys
from services.coordinator.link_keeper import LinkKeeper
from services.coordinator.network_view import NetworkView
from services.coordinator.observers import Observers
from services.coordinator.orders import DataKeys, Order, SealedPart
from services.coordinator.rekeying import Rekeying
from services.coordinator.resealing import Resealing
from services.coordinator.shown import status_of
from services.coordinator.signal import Signal, first_of
from services.coordinator.store import Store
from services.coordinator.store_thread import StoreThread
from services.coordinator.tracked import Tracked, is_new_stage

log = get_logger(__name__)

Command = Callable[[Job], Verdict]
Wish = Callable[[Job, str, Now], Verdict]
_TICK_S = 0.25
_PRUNE_EVERY_S = 1.0
_WATCH_EVERY_S = 0.05
_MAX_STEPS = 16


class JobCoordinator:
    """Owns all jobs. Decisions are pure (domain/); this class stores them, then lets effects follow from them.

    One task decides, one job after another, so nothing needs a lock; others leave observations, commands.
    `services.coordinator.main.run` builds one:

    >>> from cortex import parse_job
    >>> from services.coordinator.domain.reach import EVERYTHING, Caller
    >>> job = parse_job({
    ...     "model": {"input_dim": 64, "output_dim": 10},
    ...     "data": {"train": "digits"},
    ...     "training": {"rounds": 2},
    ...     "placement": {"workers": 2},
    ... })
    >>> job_id = await coordinator.submit(job, Caller("ann"), request_id="today's run")
    >>> job_id == await coordinator.submit(job, Caller("ann"), request_id="today's run")  # sent twice, taken once
    True
    >>> async for status in coordinator.watch(job_id, EVERYTHING):
    ...     pass
    >>> status.status.value, [(report.round, report.accepted) for report in status.history]
    ('completed', [(1, 2), (2, 2)])
    """

    def __init__(
        self,
        store: StoreThread[Store],
        keys: JobKeys,
        rekeying: Rekeying,
        attendance: Attendance,
        network: NetworkView,
        links: LinkKeeper,
        deployment: ModelDeploymentManager,
        resealing: Resealing,
        observers: Observers,
        known_datasets: Mapping[str, Dataset],
        datasets: SealedDatasets,
        clock: Clock,
        rules: Rules,
        epoch: int,
        woken: asyncio.Event,
    ) -> None:
        self._store = store
        self._keys = keys
        self._rekeying = rekeying
        self._attendance = attendance
        self._network = network
        self._links = links
        self._deployment = deployment
        self._resealing = resealing
        self._observers = observers
        self._known = known_datasets
        self._datasets = datasets
        self._clock = clock
        self._rules = rules
        self._epoch = epoch
        self._jobs: dict[JobId, Tracked] = {}
        self._commands: list[tuple[JobId, Command, asyncio.Future[None]]] = []
        self._wake = woken
        self._new_event = Signal()

    async def take_up(self) -> None:
        """Take up all unfinished jobs. Nobody is to be answered before: who asks would hear that nothing is wanted."""
        now_s = self._clock.monotonic_s()
        for job in await self._store.call(lambda store: store.unfinished()):
            await self._keys.load(job.id)
            self._jobs[job.id] = Tracked(job, Seen(since_s=now_s))
            log.info("job_taken_up", job_id=job.id, stage=job.stage.value, round=job.round)
        self._attendance.give(self._orders())

    async def run(self) -> None:
        """Run all jobs, for ever.

        Raises:
            ConflictError: another coordinator has taken over.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                self._wake.clear()
                await self._settle_all(tasks)
                self._attendance.give(self._orders())
                self._observers.jobs(tracked.job for tracked in self._jobs.values())
                await self._wake.wait()

    def wake(self) -> None:
        """Something was seen: decide again."""
        self._wake.set()

    async def submit(self, spec: JobSpec, caller: Caller, request_id: str | None, signed_job: str = "") -> JobId:
        """Take a job, with the envelope it came in if it is signed; durable when this returns.

        Raises:
            InvalidArgumentError: this network cannot run it; lists why.
            AlreadyExistsError: `request_id` was used for another job.
        """
        # A caller's ids are its own: nobody can meet another's job by guessing one.
        key = _request_key(caller, request_id) if request_id else None
        if key and (earlier := await self._store.call(lambda store: store.find_request(key))):
            return await self._same_job(earlier, spec, signed_job, str(request_id))
        if wrong := admission(spec, self._world(None), {**self._known, **self._datasets.known(caller.org)}):
            raise InvalidArgumentError.of(f"job {spec.name}", wrong)
        job = Job(JobId(secrets.token_hex(6)), spec, caller.name, self._clock.wall_s(), caller.org, signed_job)
        note = Note("job_submitted", 0, f"{spec.name} by {caller.name}{', signed' if signed_job else ''}")
        # A caller that gives up must not leave a job that is stored and run by nobody.
        stored = await asyncio.shield(asyncio.ensure_future(self._take(job, key, note)))
        if stored != job.id:
            return await self._same_job(stored, spec, signed_job, str(request_id))
        return job.id

    async def status(self, job_id: JobId, reach: Reach) -> JobStatus:
        """Where a job stands.

        Raises:
            NotFoundError: no such job within reach.
        """
        tracked = self._running(job_id, reach)
        return self._shown(tracked) if tracked else self._shown_ended(await self.job(job_id, reach))

    async def job(self, job_id: JobId, reach: Reach) -> Job:
        """The job itself.

        Raises:
            NotFoundError: no such job within reach.
        """
        if tracked := self._running(job_id, reach):
            return tracked.job
        job = await self._store.call(lambda store: store.get(job_id, reach))
        if job is None:
            raise NotFoundError(f"no job {job_id!r}")
        return job

    def running(self) -> Sequence[Job]:
        """Jobs that have not ended, or not been cleaned up."""
        return [tracked.job for tracked in self._jobs.values()]

    async def newest(self, limit: int, reach: Reach) -> Sequence[JobStatus]:
        """Jobs within reach without history, newest first."""
        stored = await self._store.call(lambda store: store.newest(limit, reach))
        return [self._shown(self._jobs[job.id]) if job.id in self._jobs else self._shown_ended(job) for job in stored]

    async def watch(self, job_id: JobId, reach: Reach) -> AsyncIterator[JobStatus]:
        """The status now, soon after each change and once a second, until the job, taken up or not yet, has ended.

        Raises:
            NotFoundError: no such job within reach.
        """
        while True:
            tracked = self._running(job_id, reach)
            status = await self.status(job_id, reach)
            yield status
            if status.status.is_terminal:
                return
            await first_of((tracked.changed if tracked else self._new_event).wait(), self._clock.sleep(1.0))
            # A round changes a dozen times in a blink; telling each would cost more than the round.
            await self._clock.sleep(_WATCH_EVERY_S)

    async def command(self, job_id: JobId, wish: Wish, caller: Caller) -> None:
        """Cancel, pause or resume a job; durable when this returns. Doing it twice is doing it once.

        Raises:
            NotFoundError: no such job within reach.
            PreconditionError: the job has ended, or is not paused.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.job(job_id, caller.reach)
        self._commands.append((job_id, lambda job: wish(job, caller.name, self._now()), done))
        self.wake()
        await done

    def report(
        self,
        worker: NodeName,
        seat: SeatIndex,
        job_id: JobId,
        round_number: int,
        attempt: int,
        change: Callable[[Seen], Seen],
    ) -> bool:
        """Note what the holder of a seat says about its round; False when that is over, or the seat another's."""
        tracked = self._jobs.get(job_id)
        if tracked is None or seat >= len(tracked.job.seats) or tracked.job.seats[seat] != worker:
            return False
        return self.observe(job_id, round_number, attempt, change)

    def observe(self, job_id: JobId, round_number: int, attempt: int, change: Callable[[Seen], Seen]) -> bool:
        """Note something about a round; False when that round is over."""
        tracked = self._jobs.get(job_id)
        if tracked is None or (tracked.job.round, tracked.job.attempt) != (round_number, attempt):
            return False
        tracked.seen = change(tracked.seen)
        tracked.changed.notify()
        self.wake()
        return not tracked.job.stage.is_terminal

    def refuse(self, worker: NodeName, job_id: JobId, rules: tuple[Refusal, ...]) -> None:
        """Note that a worker's site forbids it the job; others are asked instead."""
        tracked, line = self._jobs.get(job_id), self._attendance.lines.get(worker)
        if tracked is not None and line is not None:
            tracked.refuse(worker, rules, line)
            self.wake()

    def stage_of(self, job_id: JobId) -> Stage | None:
        """The stage of a job in memory."""
        tracked = self._jobs.get(job_id)
        return tracked.job.stage if tracked else None

    async def next_event(self) -> None:
        """Return when some job's event log has grown, or after a second."""
        await first_of(self._new_event.wait(), self._clock.sleep(1.0))

    def _running(self, job_id: JobId, reach: Reach) -> Tracked | None:
        """A job in memory, if it is within reach."""
        tracked = self._jobs.get(job_id)
        return tracked if tracked is not None and reach.covers(tracked.job) else None

    async def _take(self, job: Job, request_id: str | None, note: Note) -> JobId:
        """Store a new job and run it from now on; the earlier one's id when the request is not new."""
        key, now_s = await self._keys.first(job.id), job.submitted_s
        keys = [key.stored]
        stored = await self._store.call(lambda store: store.insert(job, request_id, note, self._epoch, now_s, keys))
        if stored != job.id:
            self._keys.forget(job.id)
            return stored
        self._keys.begin(job.id, key)
        self._jobs[job.id] = Tracked(job, Seen(since_s=self._clock.monotonic_s()))
        self._observers.noted(job, note)
        self.wake()
        return stored

    async def _same_job(self, earlier: JobId, spec: JobSpec, signed_job: str, request_id: str) -> JobId:
        job = await self.job(earlier, EVERYTHING)
        if (job.spec, job.signed_job) != (spec, signed_job):
            raise AlreadyExistsError(f"request_id {request_id!r} was used for another job, {earlier}")
        return earlier

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(_TICK_S)
            if self._jobs:
                self.wake()

    async def _settle_all(self, tasks: asyncio.TaskGroup) -> None:
        commands, self._commands = self._commands, []
        for job_id, decide, done in commands:
            await self._carry_out(job_id, decide, done)
        for tracked in list(self._jobs.values()):
            for _ in range(_MAX_STEPS):
                steps = self._steps(tracked)
                if not steps:
                    tracked.wait_for_others()
                if not steps or not await self._apply(tracked, steps, tasks):
                    break
            self._links.mend(tracked, tasks, self.observe, self._cleaned)
            self._resealing.mend(tracked, tasks, self._decide_later)
            if tracked.job.stage.is_terminal and tracked.job.cleaned:
                del self._jobs[tracked.job.id]
                self._rekeying.forget(tracked.job.id)
                self._keys.forget(tracked.job.id)
                self._datasets.forget(tracked.job.id)

    def _steps(self, tracked: Tracked) -> Sequence[Verdict]:
        """What is decided now, one decision after another; stored together, because each commit waits for the disk."""
        job, seen, now = tracked.job, tracked.seen, self._now()
        steps: list[Verdict] = []
        while len(steps) < _MAX_STEPS:
            verdict = advance(job, seen, self._world(job), self._rules, now)
            if verdict.job is job:
                break
            steps.append(verdict)
            if is_new_stage(job, verdict.job):
                seen = Seen(since_s=now.monotonic_s)
            job = verdict.job
            if job.stage is Stage.SEALED or job.stage.is_terminal:
                break
        return steps

    async def _carry_out(self, job_id: JobId, decide: Command, done: asyncio.Future[None]) -> None:
        tracked = self._jobs.get(job_id)
        try:
            verdict = decide(tracked.job if tracked else await self.job(job_id, EVERYTHING))
        except PreconditionError as error:
            if not done.done():
                done.set_exception(error)
            return
        if tracked is not None and verdict.job is not tracked.job:
            await self._apply(tracked, [verdict], None)
        if not done.done():
            done.set_result(None)

    async def _apply(self, tracked: Tracked, steps: Sequence[Verdict], tasks: asyncio.TaskGroup | None) -> bool:
        """Store first, believe it then; False if that has to wait for whoever holds the key-encryption key."""
        keyed, now = await self._rekeying.keyed(tracked.job, steps), self._now()
        steps, key = keyed.steps, keyed.key
        if not steps:
            tracked.wait_for(keyed.waits_for, now.monotonic_s)
            return False
        after = steps[-1].job
        notes = tuple(note for step in steps for note in step.notes)
        before, keys = tracked.job, (key.stored,) if key else ()
        await self._store.call(lambda store: store.commit(before, after, notes, self._epoch, now.wall_s, keys))
        if key is not None:
            self._keys.begin(after.id, key)
        for step in steps:
            before = tracked.job
            tracked.replace_job(step.job, self._clock.monotonic_s())
            for note in step.notes:
                self._observers.noted(step.job, note)
            if len(step.job.history) > len(before.history):
                self._observers.round_finished(step.job, now.wall_s)
                if tasks is not None and not after.stage.is_terminal:
                    self._prune(tracked, tasks)
        self._new_event.notify()
        return True

    def _prune(self, tracked: Tracked, tasks: asyncio.TaskGroup) -> None:
        """Erase versions after a round, but not after each when rounds are shorter than a second."""
        now_s = self._clock.monotonic_s()
        if now_s - tracked.pruned_s >= _PRUNE_EVERY_S:
            tracked.pruned_s = now_s
            tasks.create_task(self._deployment.prune(tracked.job, self._epoch))

    def _cleaned(self, job_id: JobId) -> None:
        self._decide_later(job_id, _as_cleaned)

    def _decide_later(self, job_id: JobId, decide: Command) -> None:
        self._commands.append((job_id, decide, asyncio.get_running_loop().create_future()))
        self.wake()

    def _orders(self) -> Mapping[NodeName, tuple[Order, ...]]:
        """What every worker has to do."""
        orders: dict[NodeName, tuple[Order, ...]] = {}
        now_s = self._clock.monotonic_s()
        for tracked in self._jobs.values():
            job = tracked.job
            given = assignments(job, tracked.seen, self._world(job), self._rules, now_s)
            if not given or job.aggregator is None:
                continue
            for worker, assignment in given.items():
                needed = self._needed(tracked, worker, assignment.seat)
                if needed is None:
                    break
                address = self._links.server(job, job.tier_of(assignment.seat)).address
                order = Order.of(job, assignment, *needed, address, self._epoch)
                orders[worker] = (*orders.get(worker, ()), tracked.resting(worker, order))
        return orders

    def _needed(self, tracked: Tracked, worker: NodeName, seat: SeatIndex) -> tuple[DataKeys, SealedPart | None] | None:
        """A worker's data keys and shards; without them the job, and only it, cannot go on."""
        try:
            return self._keys.of_worker(tracked.job, worker), self._datasets.part(tracked.job, seat)
        except (NotFoundError, CorruptError) as error:
            tracked.seen = replace(tracked.seen, fatal=error.message)
            self.wake()
            return None

    def _world(self, job: Job | None) -> World:
        """Everybody, with the places that other jobs have taken."""
        others = [
            t.job for t in self._jobs.values() if not (job and t.job.id == job.id) and not t.job.stage.is_terminal
        ]
        held: dict[NodeName, int] = {}
        for name in _seated(others):
            held[name] = held.get(name, 0) + 1
        taken = frozenset(name for name, count in held.items() if count >= self._network.slots(name))
        world = self._network.world(taken, _seated([*others, job] if job else others))
        tracked = self._jobs.get(job.id) if job else None
        return replace(world, refused=tracked.refused(self._attendance.lines)) if tracked else world

    def _shown(self, tracked: Tracked) -> JobStatus:
        now = self._now()
        world = self._world(tracked.job)
        reason = waiting_for(tracked.job, tracked.seen, world, self._rules, now.monotonic_s)
        return status_of(tracked.job, tracked.seen, world, now, reason, self._observers.tensorboard_dir(tracked.job.id))

    def _shown_ended(self, job: Job) -> JobStatus:
        folder = self._observers.tensorboard_dir(job.id)
        return status_of(job, Seen(since_s=0.0), World({}, {}), self._now(), None, folder)

    def _now(self) -> Now:
        return Now(self._clock.monotonic_s(), self._clock.wall_s())


def _request_key(caller: Caller, request_id: str) -> str:
    return hashlib.sha256(json.dumps([caller.org, caller.name, request_id]).encode()).hexdigest()


def _as_cleaned(job: Job) -> Verdict:
    return Verdict(replace(job, cleaned=True))


def _seated(jobs: Iterable[Job]) -> list[NodeName]:
    return [name for job in jobs for name in job.seats if name is not None]
