"""Rekeying: a round that is opened gets a new data key where one is due, as far as somebody is there to wrap it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError, CortexError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.logging import get_logger
from services.coordinator.domain.advance import Verdict
from services.coordinator.domain.epochs import Rotation, rotation_due, with_holders
from services.coordinator.domain.job import Job, Note, Stage
from services.coordinator.domain.seen import Rules
from services.coordinator.keys import JobKeys, NewKey
from services.coordinator.tracked import is_new_stage

log = get_logger(__name__)
_PATIENCE_S = 5.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 5.0
_SILENT = "whoever holds it does not answer"


@dataclass(frozen=True, slots=True)
class Keyed:
    """Steps that can be stored now, with the key of the epoch that they begin, if they do.

    `waits_for` is why those that would open a round are not among them.
    """

    steps: Sequence[Verdict]
    key: NewKey | None = None
    waits_for: str | None = None


class Rekeying:
    """Has new data keys made. Whoever holds the key-encryption key may be away, or be slow to answer.

    A round is opened under a key that is only old then, and the next one asks again. Where the old key will not do,
    the round waits. One question at a time is open, and after an error there is a pause before the next: no job's
    decisions wait longer than `patience_s` for another's key.
    """

    def __init__(self, keys: JobKeys, clock: Clock, rules: Rules, patience_s: float = _PATIENCE_S) -> None:
        self._keys = keys
        self._clock = clock
        self._rules = rules
        self._patience_s = patience_s
        self._asked: dict[JobId, asyncio.Task[NewKey | CortexError]] = {}
        self._kept: dict[JobId, int] = {}
        self._reason = ""
        self._again_s = -math.inf
        self._pause_s = _FIRST_WAIT_S

    async def keyed(self, before: Job, steps: Sequence[Verdict]) -> Keyed:
        """The steps as they can be stored now, with the key that a round which they open begins with.

        Args:
            before: The job as it is stored.
            steps: What was decided since, at least one.
        """
        opening, job = _opening(before, steps), steps[-1].job
        due = None if opening is None else self._due(job)
        if due is None:
            return Keyed(_noted(steps))
        try:
            key = await self._new(job, due.reason)
        except UnavailableError as error:
            if due.is_mandatory:
                why = f"the key-encryption key: {error.message}; a new data key is needed: {due.reason}"
                return Keyed(_noted(steps[:opening]), waits_for=why)
            return Keyed(_noted(steps, *self._keep(job, due.reason, error.message)))
        self._kept.pop(job.id, None)
        note = Note("data_key_rotated", job.round, f"epoch {key.stored.epoch}: {key.stored.reason}")
        opened = replace(steps[-1], job=replace(job, rekey="", key_holders=()))
        return Keyed(_noted((*steps[:-1], opened), note), key)

    def forget(self, job_id: JobId) -> None:
        """A job is over; before its keys are forgotten."""
        self._kept.pop(job_id, None)
        if task := self._asked.pop(job_id, None):
            task.cancel()

    def _due(self, job: Job) -> Rotation | None:
        try:
            newest = self._keys.newest(job.id)
        except (NotFoundError, CorruptError):
            # Said where the round's keys are asked for: the job, and only it, cannot go on.
            return None
        return rotation_due(job, newest, self._rules, self._clock.wall_s())

    async def _new(self, job: Job, reason: str) -> NewKey:
        """A key for the epoch that begins with the job's present attempt; it may have been asked for earlier.

        Raises:
            UnavailableError: there is none yet.
        """
        task = self._asked.get(job.id)
        if task is None:
            self._require_turn()
            task = self._asked[job.id] = asyncio.create_task(self._ask(job, reason))
            await asyncio.wait((task,), timeout=self._patience_s)
        if not task.done():
            raise UnavailableError(_SILENT)
        del self._asked[job.id]
        made = task.result()
        if isinstance(made, CortexError):
            self._reason, self._again_s = made.message, self._clock.monotonic_s() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_WAIT_S)
            raise UnavailableError(made.message)
        self._pause_s = _FIRST_WAIT_S
        return made.beginning(job, reason)

    def _require_turn(self) -> None:
        if any(not task.done() for task in self._asked.values()):
            raise UnavailableError(_SILENT)
        if self._clock.monotonic_s() < self._again_s:
            raise UnavailableError(self._reason)

    async def _ask(self, job: Job, reason: str) -> NewKey | CortexError:
        try:
            return await self._keys.next(job, reason)
        except (UnavailableError, NotFoundError, PreconditionError) as error:
            return error

    def _keep(self, job: Job, reason: str, error: str) -> tuple[Note, ...]:
        """Say, once an epoch, that a key which is old goes on."""
        number = self._keys.newest(job.id).number
        if self._kept.get(job.id) == number:
            return ()
        self._kept[job.id] = number
        log.warning("data_key_not_rotated", job_id=job.id, epoch=number, due=reason, reason=error)
        message = f"epoch {number} goes on, though {reason}; the key-encryption key: {error}"
        return (Note("data_key_kept", job.round, message),)


def _opening(before: Job, steps: Sequence[Verdict]) -> int | None:
    """Which of the steps opens the round that they end in; None if they open none, or not for long."""
    if steps[-1].job.stage is not Stage.COLLECTING:
        return None
    jobs = [before, *(step.job for step in steps)]
    opened = [index for index, job in enumerate(jobs[1:]) if is_new_stage(jobs[index], job)]
    return opened[-1] if opened else None


def _noted(steps: Sequence[Verdict], *notes: Note) -> tuple[Verdict, ...]:
    """The steps; the last one with everybody noted who is given the key, and with these notes."""
    if not steps:
        return ()
    *earlier, last = steps
    return (*earlier, Verdict(with_holders(last.job), (*last.notes, *notes)))
