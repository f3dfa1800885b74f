"""The board of jobs that nodes look at: one watch a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any, cast

from cortex_common.errors import UnavailableError
from cortex_common.ids import JobId
from cortex_common.job.status import JobPhase, JobStatus
from services.gateway.websocket.board import StatusBoard
from tests.waiting import eventually

JOB = JobId("job-1")


class Jobs:
    """A job whose watches end when the test says so."""

    def __init__(self) -> None:
        self.watches: list[asyncio.Event] = []

    async def watch(self, job_id: JobId, principal: object) -> AsyncGenerator[JobStatus]:
        broken = asyncio.Event()
        self.watches.append(broken)
        number = len(self.watches)
        at = datetime(2026, 1, 1, tzinfo=UTC)
        yield JobStatus(job_id=job_id, name="j", status=JobPhase.TRAINING, round=number, rounds=9, submitted_at=at)
        await broken.wait()
        raise UnavailableError("the connection was closed")


async def test_who_looked_at_a_watch_that_broke_takes_nothing_from_those_at_the_next_one() -> None:
    jobs = Jobs()
    board = StatusBoard(cast(Any, jobs))
    async with asyncio.timeout(30):
        slow, second, third = board.follow(JOB), board.follow(JOB), board.follow(JOB)
        assert (await anext(slow)).round == 1
        jobs.watches[0].set()
        await eventually(lambda: not board._watches, 30)
        assert (await anext(second)).round == 2
        # Only now does the first one, whose node was slow to take the status, hear that its watch has ended.
        assert [each.round async for each in slow] == []
        assert (await anext(third)).round == 2
        assert len(jobs.watches) == 2
        for each in (second, third):
            await cast(AsyncGenerator[JobStatus], each).aclose()
    assert not board._watches
