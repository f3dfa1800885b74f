"""What people may want of a job that runs: cancel, pause, resume. Wanting it twice is wanting it once."""

from __future__ import annotations

from dataclasses import replace

from cortex_common.errors import PreconditionError
from services.coordinator.domain.advance import Now, Verdict
from services.coordinator.domain.job import Job, Note, Stage


def cancel(job: Job, who: str, now: Now) -> Verdict:
    """End the job because somebody wants it so.

    Raises:
        PreconditionError: it has ended otherwise.
    """
    if job.stage is Stage.CANCELLED:
        return Verdict(job)
    _require_unfinished(job)
    ended = replace(job, stage=Stage.CANCELLED, finished_s=now.wall_s)
    return Verdict(ended, (Note("job_cancelled", job.round, f"cancelled by {who}"),))


def pause(job: Job, who: str, now: Now) -> Verdict:
    """Stop after the round in progress, or at once if none is.

    Raises:
        PreconditionError: the job has ended.
    """
    if job.stage is Stage.PAUSED or job.pausing:
        return Verdict(job)
    _require_unfinished(job)
    if job.stage is Stage.GATHERING:
        rested = replace(job, stage=Stage.PAUSED, seats=(), cohort=(), pausing=False)
        return Verdict(rested, (Note("job_paused", job.round, f"paused by {who}"),))
    return Verdict(replace(job, pausing=True), (Note("job_pausing", job.round, f"{who}: pause after this round"),))


def resume(job: Job, who: str, now: Now) -> Verdict:
    """Go on with a paused job, or take back a pause that has not begun.

    Raises:
        PreconditionError: it is not paused.
    """
    if job.stage is Stage.PAUSED:
        return Verdict(replace(job, stage=Stage.GATHERING), (Note("job_resumed", job.round, f"resumed by {who}"),))
    if job.pausing:
        return Verdict(replace(job, pausing=False), (Note("job_resumed", job.round, f"{who}: pause withdrawn"),))
    raise PreconditionError(f"job {job.id} is {job.phase.value}; allowed: paused")


def rotate_key(job: Job, who: str, now: Now, *, reseal: bool = False) -> Verdict:
    """Let the next round begin a new key epoch, and with `reseal` let everything stored come under it.

    Raises:
        PreconditionError: the job has ended.
    """
    if job.rekey and job.resealing >= reseal:
        return Verdict(job)
    _require_unfinished(job)
    note = Note("key_rotation_asked", job.round, f"{who}: a new data key from the next round on")
    return Verdict(replace(job, rekey=f"asked for by {who}", resealing=job.resealing or reseal), (note,))


def _require_unfinished(job: Job) -> None:
    if job.stage.is_terminal:
        raise PreconditionError(f"job {job.id} is {job.phase.value}; allowed: a job that has not ended")
