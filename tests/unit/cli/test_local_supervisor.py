"""The supervisor with real processes, of services that do nothing but answer health checks."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex.local.layout import Layout
from cortex.local.processes import ProcessId
from cortex.local.status import running_report
from tests.waiting import until

SMALL = ("--workers", "1", "--regions", "eu")
SERVICES = 5  # one of each


@pytest.fixture
def layout(folder: Path) -> Layout:
    return Layout.of(folder / ".cortex")


def up(cortex) -> dict[str, object]:
    done = cortex("up", "--detach", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pids(layout: Layout) -> dict[str, int]:
    report = running_report(layout)
    assert report is not None
    return {entry.name: entry.process.pid for entry in report.processes if entry.process}


def runs(pid: int) -> bool:
    identity = ProcessId.of(pid)
    return identity is not None and identity.is_alive()


def all_gone(processes: list[int]) -> Callable[[], bool]:
    return lambda: not any(runs(pid) for pid in processes)


def test_up_starts_every_service_and_down_leaves_none(cortex, layout):
    facts = up(cortex)
    rows = json.loads(cortex("ps", "--json").stdout)
    report = running_report(layout)
    assert report is not None
    running = [report.supervisor.pid, *(row["pid"] for row in rows)]

    assert [row["health"] for row in rows] == ["healthy"] * SERVICES
    assert str(facts["gateway"]).startswith("http://127.0.0.1:")
    assert stat.S_IMODE(layout.token_file.stat().st_mode) == 0o600
    assert layout.token_file.read_text().strip() == facts["token"]

    refused = cortex("up", "--detach")
    assert refused.returncode == 1
    assert "already running" in refused.stderr

    assert cortex("down").returncode == 0
    assert all_gone(running)()
    assert cortex("down").stdout.startswith("no network was running")
    assert [row["health"] for row in json.loads(cortex("ps", "--json").stdout)] == ["down"] * SERVICES

    again = json.loads(cortex("up", "--detach", "--json").stdout)
    assert (again["token"], again["workers"], list(again["aggregators"])) == (
        facts["token"],
        ["eu-1"],
        ["aggregator-eu"],
    )


def test_a_killed_service_is_started_again(cortex, layout):
    up(cortex)
    before = pids(layout)

    os.kill(before["eu-1"], signal.SIGKILL)

    until(lambda: pids(layout).get("eu-1", before["eu-1"]) != before["eu-1"])
    until(lambda: json.loads(cortex("ps", "--json").stdout)[-1]["health"] == "healthy")
    row = json.loads(cortex("ps", "--json").stdout)[-1]
    assert (row["name"], row["restarts"]) == ("eu-1", 1)
    assert {name: pid for name, pid in pids(layout).items() if name != "eu-1"} == {
        name: pid for name, pid in before.items() if name != "eu-1"
    }


def test_services_end_with_a_killed_supervisor_and_the_next_up_works(cortex, layout):
    up(cortex)
    report = running_report(layout)
    assert report is not None
    processes = list(pids(layout).values())

    report.supervisor.send(signal.SIGKILL)

    until(all_gone(processes))
    up(cortex)
    assert len(pids(layout)) == SERVICES


def test_a_service_that_keeps_dying_fails_the_start_with_the_end_of_its_log(cortex, layout):
    layout.state("eu-1").mkdir(parents=True)
    (layout.state("eu-1") / "behave").write_text("die")

    done = cortex("up", "--detach", *SMALL)

    assert done.returncode == 1
    assert "eu-1 died 3 times (exit code 3)" in done.stderr
    assert "the disk is on fire" in done.stderr
    assert running_report(layout) is None


def test_ctrl_c_stops_everything_even_what_ignores_sigterm(cortex, layout, folder):
    layout.state("eu-1").mkdir(parents=True)
    (layout.state("eu-1") / "behave").write_text("hang")
    command = [sys.executable, "-m", "cortex", "up", *SMALL]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    until(lambda: "every service is healthy" in (process.stdout.readline() if process.stdout else ""))
    processes = list(pids(layout).values())

    process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "all services stopped" in err
    assert all_gone(processes)()
