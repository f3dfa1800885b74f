"""What leaves a site is counted right, also when several of its jobs send at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cortex_common.ids import JobId
from services.worker.outgoing import Outgoing

JOBS = [JobId(f"job-{number}") for number in range(4)]
UPDATES = 25


def test_jobs_that_send_at_the_same_time_are_all_counted(tmp_path: Path) -> None:
    outgoing = Outgoing(tmp_path / "outgoing.json")

    def send(job: JobId) -> None:
        for _ in range(UPDATES):
            outgoing.reserve(job, 10)
            outgoing.settle(job, 10, 7)

    with ThreadPoolExecutor(len(JOBS)) as threads:
        list(threads.map(send, JOBS))
    for counts in (outgoing, Outgoing(tmp_path / "outgoing.json")):
        assert [counts.spent(job) for job in JOBS] == [7 * UPDATES] * len(JOBS)
