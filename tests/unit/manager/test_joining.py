"""Which job a program trains in, and what it says while there is none for it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cortex.integration import joining
from cortex.integration.settings import load_manager_settings
from cortex_common.clock import SystemClock
from cortex_common.errors import PreconditionError, UnavailableError
from cortex_common.ids import JobId
from cortex_common.job.status import JobPhase, JobStatus
from tests.unit.manager.test_manager_settings import CONTRACT


def status(phase: JobPhase, **more: object) -> JobStatus:
    return JobStatus(job_id="j1", name="own", status=phase, round=1, rounds=3, submitted_at=datetime.now(UTC), **more)


class Node:
    """Has work after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    async def assigned(self, timeout_s: float) -> JobId | None:
        self.looks -= 1
        return JobId("j1") if self.looks < 0 else None

    def refusals(self, job: object) -> tuple[()]:
        return ()


class Network:
    """Answers with one status after another, the last one for ever."""

    def __init__(self, *statuses: JobStatus | Exception) -> None:
        self.statuses = list(statuses)

    def jobs(self) -> Sequence[JobStatus]:
        return [status(JobPhase.TRAINING)]

    def submit(self, job: object, request_id: str) -> str:
        return "j1"

    def status(self, job_id: str) -> JobStatus:
        answer = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def settings(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONTRACT)
    return load_manager_settings(tmp_path / "config.yaml", {})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []

    class Log:
        def info(self, event: str, **_: object) -> None:
            lines.append((event, ""))

        def warning(self, event: str, job_waits_for: str, **_: object) -> None:
            lines.append((event, job_waits_for))

    monkeypatch.setattr(joining, "_log", Log())
    return lines


async def test_a_program_whose_job_has_no_place_for_it_says_what_is_waited_for_and_ends_with_the_job(settings, said):
    taken = [status(JobPhase.TRAINING, waiting_for=f"worker n1 (lost {age} s ago); deadline in 9 s") for age in (1, 6)]
    network = Network(taken[0], *taken, UnavailableError("away"), status(JobPhase.COMPLETED))
    with pytest.raises(PreconditionError, match=r"job j1 completed without this node: its places were taken"):
        await joining.join(Node(99), network, settings, SystemClock())
    assert said == [("job_found", ""), ("no_work_yet", "worker n1 (lost 1 s ago); deadline in 9 s")]


async def test_a_program_that_waits_for_others_is_in_the_job_as_soon_as_it_has_work(settings, said):
    network = Network(status(JobPhase.SUBMITTED, waiting_for="workers: 1 of 2 ready"))
    assert await joining.join(Node(3), network, settings, SystemClock()) == "j1"
    assert said == [("job_found", ""), ("no_work_yet", "workers: 1 of 2 ready")]
