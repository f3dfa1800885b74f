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
from cortex_common.job.status import JobPhase, JobStatus, WorkerActivity
from tests.unit.manager.test_manager_settings import CONTRACT


def status(phase: JobPhase, *workers: str, **more: object) -> JobStatus:
    at_work = tuple(WorkerActivity(seat=0, worker=each, region="eu", activity="", since_s=0.0) for each in workers)
    more |= {"round": 1, "rounds": 3, "submitted_at": datetime.now(UTC), "workers": at_work}
    return JobStatus(job_id="j1", name="own", status=phase, **more)


class Node:
    """Has work of a job after so many looks."""

    def __init__(self, looks: int, job_id: str = "j1") -> None:
        self.looks = looks
        self.job_id = JobId(job_id)

    async def assigned(self, timeout_s: float) -> JobId | None:
        self.looks -= 1
        return self.job_id if self.looks < 0 else None

    def refusals(self, job: object) -> tuple[()]:
        return ()


class Network:
    """Answers with one status after another, the last one for ever; jobs are j1, j2 and so on."""

    def __init__(self, *statuses: JobStatus | Exception) -> None:
        self.statuses = list(statuses)
        self.submitted: list[str] = []

    def jobs(self) -> Sequence[JobStatus]:
        return [status(JobPhase.TRAINING)]

    def submit(self, job: object, request_id: str) -> str:
        self.submitted.append(f"j{request_id.rpartition('-')[2]}")
        return self.submitted[-1]

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


async def test_a_program_that_waits_for_a_place_says_what_the_job_waits_for_and_ends_with_it(settings, said):
    freed = [status(JobPhase.TRAINING, waiting_for=f"worker n1 (lost {age} s ago); deadline in 9 s") for age in (1, 6)]
    network = Network(freed[0], *freed, UnavailableError("away"), status(JobPhase.FAILED, error="deadline"))
    with pytest.raises(PreconditionError, match=r"job j1 failed: deadline"):
        await joining.join(Node(99), network, settings, SystemClock())
    assert said == [("job_found", ""), ("no_work_yet", "worker n1 (lost 1 s ago); deadline in 9 s")]


@pytest.mark.parametrize("seen", [status(JobPhase.TRAINING, "n1"), status(JobPhase.COMPLETED)])
async def test_a_program_whose_job_others_have_gets_one_of_its_own(settings, said, seen: JobStatus):
    network = Network(status(JobPhase.TRAINING), seen, status(JobPhase.SUBMITTED))
    assert await joining.join(Node(2, "j2"), network, settings, SystemClock()) == "j2"
    assert network.submitted == ["j1", "j2"]
    assert [event for event, _ in said] == ["job_found", "job_full", "job_submitted"]


async def test_a_place_that_this_node_has_is_waited_for(settings, said):
    network = Network(status(JobPhase.TRAINING, settings.network.node_id, waiting_for="its first work"))
    assert await joining.join(Node(3), network, settings, SystemClock()) == "j1"
    assert network.submitted == ["j1"]


async def test_a_program_that_waits_for_others_is_in_the_job_as_soon_as_it_has_work(settings, said):
    network = Network(status(JobPhase.SUBMITTED, waiting_for="workers: 1 of 2 ready"))
    assert await joining.join(Node(3), network, settings, SystemClock()) == "j1"
    assert said == [("job_found", ""), ("no_work_yet", "workers: 1 of 2 ready")]
