"""CPU time and peak memory of processes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cortex_common.clock import SystemClock

_RESET_PEAK = "5"


def peak_bytes(pid: int) -> int:
    """Largest resident memory a process ever had, or has had since `reset_peak`. Linux only."""
    return _status_bytes(pid, "VmHWM")


def shared_bytes(pid: int) -> int:
    """Resident memory a process shares with those that map it too: anonymous, as an arena's. Linux only."""
    return _status_bytes(pid, "RssShmem")


def reset_peak(pid: int) -> None:
    """Have `peak_bytes` begin anew, with what the process takes now. Linux only; one's own processes."""
    Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def peak_of_all(pids: Collection[int]) -> int:
    """What processes had at most: no less, and more only by as much as their peaks lie apart in time.

    What they share counts once, if all of them map all of it: a worker and its trainer do, after the first round.
    """
    shared = [shared_bytes(pid) for pid in pids]
    return sum(peak_bytes(pid) for pid in pids) - (sum(shared) - max(shared, default=0))


def _status_bytes(pid: int, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/{pid}/status holds no {name}")
    return int(match[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all its children that have ended.

    The kernel hands a process the time of each child that it waits for, so nothing is lost when a trainer ends.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU-seconds by group of processes, of the whole machine, and when that was."""

    at_s: float
    groups: Mapping[str, float]
    machine_s: float

    def since(self, before: Usage) -> Usage:
        """What was used in between; `at_s` is the wall time that passed.

        The kernel rounds each process's time to ticks of 10 ms, so nothing may show as a tick less than nothing.
        """
        groups = {name: max(0.0, used - before.groups.get(name, 0.0)) for name, used in self.groups.items()}
        return Usage(self.at_s - before.at_s, groups, self.machine_s - before.machine_s)

    @property
    def total_s(self) -> float:
        """CPU-seconds of all groups."""
        return sum(self.groups.values())

    @property
    def others(self) -> float:
        """Cores that processes outside the groups kept busy."""
        return max(0.0, self.machine_s - self.total_s) / self.at_s if self.at_s else 0.0


def usage_of(roots: Mapping[str, frozenset[int]]) -> Usage:
    """What these processes and all their descendants, ended ones included, have used until now.

    Args:
        roots: Process ids by group. A root below another one counts in its own group only.

    Raises:
        RuntimeError: a root has ended; what it used is no longer known.
    """
    while (used := _used(roots)) is None:
        for name, pids in roots.items():
            if gone := [pid for pid in pids if not psutil.pid_exists(pid)]:
                raise RuntimeError(f"{name}: process {gone[0]} ended while it was measured")
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    return Usage(SystemClock().monotonic_s(), used, float(busy))


def _used(roots: Mapping[str, frozenset[int]]) -> Mapping[str, float] | None:
    """CPU-seconds by group; None if a process came or went meanwhile: its time may then count twice, or not at all."""
    trees = _trees(roots)
    try:
        used = {name: sum(cpu_seconds(pid) for pid in pids) for name, pids in trees.items()}
    except psutil.NoSuchProcess:
        return None
    return used if trees == _trees(roots) else None


def _trees(roots: Mapping[str, frozenset[int]]) -> Mapping[str, frozenset[int]]:
    every = frozenset().union(*roots.values())
    return {name: frozenset().union(*(tree_of(pid, every) for pid in pids)) for name, pids in roots.items()}


def tree_of(pid: int, roots: frozenset[int] = frozenset()) -> frozenset[int]:
    """A process and its descendants, but for those that are roots themselves, with what is below them."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        found.add(current)
        try:
            children = psutil.Process(current).children()
        except psutil.NoSuchProcess:
            continue
        waiting += [child.pid for child in children if child.pid not in roots]
    return frozenset(found)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
