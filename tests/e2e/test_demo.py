"""`cortex demo`, to its end and cut short."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from cortex.local.layout import Layout
from cortex.local.status import running_report
from tests.e2e.conftest import Shell
from tests.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEMO = ("demo", "--dataset", "digits", "--workers", "2")


def processes_in(folder: Path) -> list[int]:
    """Processes that were started with a path of this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.info["cmdline"] or [])
    ]


def test_the_demo_ends_with_its_status_a_model_and_nothing_running(tmp_path):
    shell = Shell(tmp_path)

    status = shell.json(*DEMO, "--rounds", "3")

    assert status["status"] == "completed"
    assert len(status["history"]) == 3
    model = tmp_path / "demo-model.safetensors"
    assert hashlib.sha256(model.read_bytes()).hexdigest() == status["model"]["sha256"]
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_demo_cut_short_leaves_no_process_behind(tmp_path, number, code):
    shell = Shell(tmp_path)
    demo = shell.start(*DEMO, "--rounds", "500")
    assert demo.stderr is not None
    until(lambda: "submitted job" in (demo.stderr.readline() if demo.stderr else ""), timeout_s=100)
    assert running_report(Layout.of(tmp_path / ".cortex" / "demo")) is not None

    os.kill(demo.pid, number)

    demo.communicate(timeout=60)
    assert demo.returncode == code
    until(lambda: processes_in(tmp_path) == [], timeout_s=30)


def test_a_running_network_is_not_wiped_by_the_demo(tmp_path):
    shell = Shell(tmp_path)
    up = shell.run("up", "--detach", "--workers", "1", "--regions", "eu")
    assert up.returncode == 0, up.stderr
    before = json.loads(shell.layout.network_file.read_text())

    done = shell.run(*DEMO, "--dir", ".cortex")

    assert done.returncode == 1
    assert "already running" in done.stderr
    assert json.loads(shell.layout.network_file.read_text()) == before
    assert shell.run("down").returncode == 0
    assert processes_in(tmp_path) == []
