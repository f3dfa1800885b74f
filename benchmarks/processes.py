"""CPU time and peak memory of processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cortex_common.clock import SystemClock

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def peak_bytes(pid: int) -> int:
    """Largest resident memory a process ever had. Linux only."""
    match = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/{pid}/status holds no VmHWM")
    return int(match[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 once it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU-seconds by group of processes, of the whole machine, and when that was."""

    at_s: float
    groups: Mapping[str, float]
    machine_s: float

    def since(self, before: Usage) -> Usage:
        """What was used in between; `at_s` is the wall time that passed."""
        groups = {name: used - before.groups.get(name, 0.0) for name, used in self.groups.items()}
        return Usage(self.at_s - before.at_s, groups, self.machine_s - before.machine_s)

    @property
    def total_s(self) -> float:
        """CPU-seconds of all groups."""
        return sum(self.groups.values())

    @property
    def others(self) -> float:
        """Cores that processes outside the groups kept busy."""
        return max(0.0, self.machine_s - self.total_s) / self.at_s if self.at_s else 0.0


def usage_of(groups: Mapping[str, frozenset[int]]) -> Usage:
    """What these processes have used until now."""
    used = {name: sum(cpu_seconds(pid) for pid in pids) for name, pids in groups.items()}
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    return Usage(SystemClock().monotonic_s(), used, float(busy))


def children_of(pid: int) -> frozenset[int]:
    """Descendants of a process."""
    try:
        return frozenset(child.pid for child in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return frozenset()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
