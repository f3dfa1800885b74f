from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys

from cortex.local.child import LONGEST_WAIT_S, SETTLED_S, Child, child_environment, exit_words, next_wait_s
from cortex.local.layout import Layout
from cortex.local.members import Member
from cortex.local.network import LocalNetwork
from cortex.local.processes import ProcessId
from cortex.local.status import Phase, ProcessReport, SupervisorReport, ready_facts, running_report, write_report
from cortex.local.supervisor import Supervisor, clean_up
from cortex_common.identity import Role


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)


def test_a_pid_that_belongs_to_somebody_else_now_counts_as_gone():
    own = ProcessId.of(os.getpid())

    assert own is not None
    assert own.is_alive()
    assert not ProcessId(pid=own.pid, started_s=own.started_s - 60).is_alive()


def test_a_zombie_counts_as_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    identity = ProcessId.of(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert identity is not None
    assert not identity.is_alive()
    process.wait()


def test_clean_up_ends_what_a_killed_supervisor_left_and_spares_strangers(tmp_path):
    layout = Layout.of(tmp_path)
    ours, stranger = sleeper(), sleeper()
    left = ProcessId.of(ours.pid)
    reused = ProcessId.of(stranger.pid)
    assert left is not None
    assert reused is not None
    gone = ProcessId(pid=os.getpid(), started_s=1.0)
    processes = (
        ProcessReport(name="eu-1", process=left),
        ProcessReport(name="us-1", process=ProcessId(pid=reused.pid, started_s=reused.started_s - 3600)),
    )
    write_report(layout, SupervisorReport(supervisor=gone, phase=Phase.RUNNING, processes=processes))
    layout.ready("eu-1").write_text("{}")

    assert running_report(layout) is None
    assert clean_up(layout) == ["eu-1"]
    ours.wait(5)
    assert not left.is_alive()
    assert stranger.poll() is None
    assert not list(layout.run.glob("*.json"))
    stranger.kill()
    stranger.wait()


def test_a_ready_file_of_an_earlier_process_does_not_count(tmp_path):
    layout = Layout.of(tmp_path)
    layout.run.mkdir()
    layout.ready("eu-1").write_text('{"pid": 12, "metrics_port": 9}')

    assert ready_facts(layout, "eu-1", 13) is None
    assert ready_facts(layout, "eu-1", 12) == {"pid": 12, "metrics_port": 9}


def test_who_dies_young_waits_longer_each_time():
    waits, wait_s = [], 0.0
    for _ in range(7):
        wait_s = next_wait_s(wait_s, lived_s=0.1)
        waits.append(wait_s)

    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert next_wait_s(wait_s, lived_s=SETTLED_S) == 0.2


def test_services_do_not_inherit_what_is_meant_for_the_client():
    given = {"PATH": "/bin", "CORTEX_DIR": "x", "CORTEX_ENDPOINT": "y", "CORTEX_LOG_LEVEL": "DEBUG", "CORTEX_PORT": "1"}

    environment = child_environment(given, parent=7)

    assert {key for key in environment if key.startswith("CORTEX_")} == {"CORTEX_LOG_LEVEL", "CORTEX_PARENT_PID"}
    assert environment["CORTEX_PARENT_PID"] == "7"


def test_exit_codes_are_told_in_words():
    assert exit_words(3) == "exit code 3"
    assert exit_words(-9) == "killed by SIGKILL"


async def test_a_full_disk_ends_neither_the_network_nor_its_orderly_stop(tmp_path, clock, monkeypatch):
    starts = []

    class Process:
        pid = 1 << 30  # of nobody
        returncode = 1

        async def wait(self) -> int:
            return self.returncode

    async def start(self: Child) -> Process:
        starts.append(self.member.name)
        return Process()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Child, "_start", start)
    worker = Member(service=Role.WORKER, name="eu-1", region="eu")
    supervisor = Supervisor(Layout.of(tmp_path), LocalNetwork(members=(worker,)), clock)
    async with asyncio.timeout(30), supervisor.running():
        monkeypatch.setattr("cortex.local.supervisor.write_report", full)
        broken = asyncio.create_task(supervisor.broken())
        for _ in range(3):
            await clock.until_sleeping()
            await clock.advance(LONGEST_WAIT_S)
        assert len(starts) > 3
        assert not broken.done()
        broken.cancel()
