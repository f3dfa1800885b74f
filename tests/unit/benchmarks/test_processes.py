"""CPU time of a group of processes that start and end while they are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.processes import peak_bytes, peak_of_all, reset_peak, shared_bytes, tree_of, usage_of

_TICKS_S = 0.03
_TRAINER = "import time\nwhile time.process_time() < {busy_s}: pass\nprint('busy', flush=True)\ninput()"
_WORKER = """
import subprocess, sys
for line in sys.stdin:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", {trainer!r}], **pipes)
    print(child.stdout.readline().strip(), flush=True)
    sys.stdin.readline()
    child.communicate("end")
    print("ended", flush=True)
"""


@contextmanager
def _worker(busy_s: float) -> Iterator[subprocess.Popen[str]]:
    """Each line given to it starts a trainer, or ends it; it answers."""
    program = _WORKER.format(trainer=_TRAINER.format(busy_s=busy_s))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def _told(worker: subprocess.Popen[str]) -> str:
    worker.stdin.write("next\n")
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def test_a_trainer_that_ends_within_the_period_takes_nothing_away() -> None:
    with _worker(busy_s=0.3) as worker:
        roots = {"workers": frozenset({worker.pid})}
        start = usage_of(roots)
        assert _told(worker) == "busy"
        running = usage_of(roots)
        assert _told(worker) == "ended"
        ended = usage_of(roots)
    assert running.since(start).groups["workers"] >= 0.25
    assert ended.groups["workers"] - running.groups["workers"] >= -_TICKS_S
    assert ended.since(start).groups["workers"] >= 0.25


def test_a_root_below_another_one_counts_in_its_own_group_only() -> None:
    with _worker(busy_s=0.3) as worker:
        assert _told(worker) == "busy"
        roots = {"here": frozenset({os.getpid()}), "workers": frozenset({worker.pid})}
        before = usage_of({"all": frozenset({os.getpid()})}).groups["all"]
        used = usage_of(roots).groups
    assert used["workers"] >= 0.25
    assert used["here"] <= before - 0.2
    assert worker.pid not in tree_of(os.getpid(), frozenset({worker.pid}))


def test_a_service_that_has_ended_is_no_longer_measured() -> None:
    with _worker(busy_s=0.0) as worker:
        pass
    with pytest.raises(RuntimeError, match=f"workers: process {worker.pid} ended"):
        usage_of({"workers": frozenset({worker.pid})})


_HOLDER = """
import mmap, sys
held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(bytes(64 << 20))
held.close()
print("let go", flush=True)
shared = mmap.mmap(-1, 8 << 20)
shared.write(bytes(8 << 20))
print("shares", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_peak_can_begin_anew_and_what_is_shared_is_told() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _HOLDER], **pipes) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = peak_bytes(holder.pid)
        holder.stdout.readline()
        reset_peak(holder.pid)
        assert peak_bytes(holder.pid) < before - (40 << 20)
        assert shared_bytes(holder.pid) >= 8 << 20
        # Two that map the same memory have it once.
        assert peak_of_all([holder.pid, holder.pid]) == 2 * peak_bytes(holder.pid) - shared_bytes(holder.pid)
        holder.communicate("end\n")
