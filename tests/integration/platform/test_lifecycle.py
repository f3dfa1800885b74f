"""How a service process starts and ends; real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cortex_common.lifecycle import write_ready_file

PREAMBLE = """
import asyncio, os, signal, sys
from cortex_common.errors import PreconditionError
from cortex_common.lifecycle import run_service
async def serve(stop):
    print("ready", flush=True)
    await stop.wait()
    print("drained", flush=True)
"""


def start(body: str) -> subprocess.Popen[str]:
    code = PREAMBLE + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_service_drain(number: signal.Signals) -> None:
    process = start("sys.exit(run_service(serve))")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=10)
    assert (out, process.returncode) == ("drained\n", 0)


def test_a_service_may_have_as_many_files_open_as_the_system_lets_it() -> None:
    process = start("""
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        async def main(stop):
            print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard), flush=True)
        sys.exit(run_service(main))
    """)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("True\n", 0)


def test_a_second_signal_ends_a_service_that_does_not_drain() -> None:
    process = start("""
        async def hang(stop):
            await stop.wait()
            print("stopping", flush=True)
            await asyncio.Event().wait()
        async def main(stop):
            print("ready", flush=True)
            await hang(stop)
        sys.exit(run_service(main))
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "stopping\n"
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_mistake_is_told_without_a_traceback() -> None:
    process = start("""
        async def main(stop):
            async with asyncio.TaskGroup() as tasks:
                async def fail(): raise PreconditionError("port 5 is taken")
                tasks.create_task(fail())
        sys.exit(run_service(main))
    """)
    _, error = process.communicate(timeout=10)
    assert (error, process.returncode) == ("error: port 5 is taken\n", 1)


def test_a_bug_is_one_log_line_and_exit_code_1() -> None:
    process = start("""
        from cortex_common.logging import configure_logging
        configure_logging("example")
        async def main(stop):
            async with asyncio.TaskGroup() as tasks:
                async def fail(): raise KeyError("what")
                tasks.create_task(fail())
        sys.exit(run_service(main))
    """)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 1
    (line,) = error.splitlines()
    assert json.loads(line)["event"] == "crashed"
    assert "KeyError" in line


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_service_ends_with_its_parent(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(PREAMBLE + "sys.exit(run_service(serve, parent_pid=int(sys.argv[1])))")
    parent = start(f"""
        import subprocess
        subprocess.Popen([sys.executable, {str(child)!r}, str(os.getpid())])
        signal.pause()
    """)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    # The child holds the pipe open until it ends.
    out, _ = parent.communicate(timeout=10)
    assert out == "drained\n"


def test_a_parent_that_is_gone_is_told() -> None:
    process = start("sys.exit(run_service(serve, parent_pid=999999999))")
    _, error = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "parent process 999999999 has ended" in error


def test_a_ready_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "c1.json"
    write_ready_file(path, {"name": "c1", "service": "coordinator", "address": "127.0.0.1:5"})
    assert json.loads(path.read_text()) == {
        "name": "c1", "service": "coordinator", "address": "127.0.0.1:5", "pid": os.getpid(),
    }  # fmt: skip
    assert [each.name for each in path.parent.iterdir()] == ["c1.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hides a process's memory")
def test_a_process_that_hides_its_memory_can_neither_be_dumped_nor_looked_into() -> None:
    program = """
    import ctypes, resource
    from cortex_common.lifecycle import hide_memory
    def told():
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE) == (0, 0))
    told()
    hide_memory()
    told()
    """
    process = start(program)
    out, _ = process.communicate(timeout=30)
    before, after = out.splitlines()
    assert (before[0], after) == ("1", "0 True")
