"""What a worker does about the work of one job, whatever the coordinator says about it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.worker import job_runner
from services.worker.job_runner import JobRunner
from tests.fakes import ManualClock, settle
from tests.unit.worker.test_kept_update import assignment
from tests.waiting import eventually


class EndlessWork:
    """Stands in for the work itself: never done."""

    begun = 0

    def __init__(self, *_: Any) -> None:
        pass

    async def run(self) -> None:
        type(self).begun += 1
        await asyncio.Event().wait()


class Coordinator:
    """Knows no assignment, as one that has just started and not taken its jobs up yet."""

    def __init__(self) -> None:
        self.heard = 0

    async def report(self, _report: Any, *, is_urgent: bool) -> bool:
        self.heard += 1
        return False


class Around:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock


class Bench:
    def close(self) -> None:
        pass


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
async def runner(monkeypatch: pytest.MonkeyPatch, coordinator: Coordinator) -> AsyncIterator[JobRunner]:
    monkeypatch.setattr(job_runner, "Execution", EndlessWork)
    monkeypatch.setattr(EndlessWork, "begun", 0)
    clock: Any = ManualClock()
    bench, around = Bench(), Around(clock)
    made = JobRunner(bench, around, coordinator)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        made.update([assignment()], again=True)
        made.start(tasks)
        await eventually(lambda: EndlessWork.begun == 1)
        await clock.advance(1.0)
        assert coordinator.heard == 1
        yield made
        await made.close()


async def test_what_is_not_wanted_stays_dropped_while_the_same_line_lists_it(runner: JobRunner) -> None:
    runner.update([assignment()], again=False)
    await settle()
    assert EndlessWork.begun == 1


async def test_what_a_new_line_lists_is_done_whatever_was_said_before(runner: JobRunner) -> None:
    runner.update([assignment()], again=True)
    await eventually(lambda: EndlessWork.begun == 2)
