"""What a machine has and how busy it is."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil
import pynvml

from cortex_common.telemetry.hardware import Gpu, Resources

__all__ = ["Gpu", "Resources", "probe_resources"]

# Core-seconds; shorter ones say little.
_SHORTEST_SAMPLE_S = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def probe_resources(disk: Path | None = None, *, slots: int = 0, free_slots: int = 0) -> Resources:
    """Measure this machine now.

    Args:
        disk: A path on the file system whose free space counts; the working directory by default.
        slots: See Resources.
        free_slots: See Resources.
    """
    memory_bytes, available_bytes = _memory()
    sent_bytes, received_bytes = _network()
    return Resources(
        cpu_cores=cpu_cores(),
        cpu_utilisation=_CPU.utilisation(),
        memory_bytes=memory_bytes,
        memory_available_bytes=available_bytes,
        disk_free_bytes=_disk_free(disk or Path.cwd()),
        network_sent_bytes=sent_bytes,
        network_received_bytes=received_bytes,
        gpus=tuple(_gpus()),
        slots=slots,
        free_slots=free_slots,
    )


class _CpuMeter:
    """Use of the machine's cores between samples, whichever thread asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total_s, self._idle_s = self._read()
        self._last = 0.0

    def utilisation(self) -> float:
        """Share in use since the last sample that is old enough to tell, 0 to 1."""
        with self._lock:
            total_s, idle_s = self._read()
            passed_s = total_s - self._total_s
            if passed_s >= _SHORTEST_SAMPLE_S:
                self._last = min(1.0, max(0.0, 1 - (idle_s - self._idle_s) / passed_s))
                self._total_s, self._idle_s = total_s, idle_s
            return self._last

    @staticmethod
    def _read() -> tuple[float, float]:
        """Seconds of all cores together since the boot, and those of them idle."""
        times = psutil.cpu_times()
        # Guests are counted in user time already.
        guests_s = float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))
        return float(sum(times)) - guests_s, float(times.idle + getattr(times, "iowait", 0.0))


_CPU = _CpuMeter()


def cpu_cores() -> int:
    """Cores this process may use: its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = (_cgroup("cpu.max") or "max").split()
    if quota[0] == "max" or len(quota) != 2:
        return cores
    return max(1, min(cores, math.ceil(int(quota[0]) / int(quota[1]))))


def _memory() -> tuple[int, int]:
    """Bytes in all and free: the machine's, or the container's where that is less."""
    machine = psutil.virtual_memory()
    limit = _cgroup("memory.max")
    used = _cgroup("memory.current")
    if not limit or not limit.isdigit() or not used or not used.isdigit() or int(limit) >= machine.total:
        return machine.total, machine.available
    reclaimable = _cgroup_inactive_file()
    free = max(0, int(limit) - int(used) + reclaimable)
    return int(limit), min(free, machine.available)


def _cgroup_inactive_file() -> int:
    """Bytes of page cache the kernel gives back when asked; counted as used by the container."""
    for line in (_cgroup("memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _cgroup(name: str) -> str | None:
    try:
        return (_CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _network() -> tuple[int, int]:
    counters = psutil.net_io_counters()
    return (counters.bytes_sent, counters.bytes_recv) if counters else (0, 0)


def _disk_free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return int(psutil.disk_usage(str(path)).free)


def _gpus() -> Iterator[Gpu]:
    for index in range(_gpu_count()):
        try:
            yield _gpu(index)
        except pynvml.NVMLError:
            continue


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except pynvml.NVMLError:
        utilisation = 0.0
    return Gpu(name if isinstance(name, str) else name.decode(), int(memory.total), int(memory.used), utilisation)


@cache
def _gpu_count() -> int:
    """How many NVIDIA GPUs are here; looked up once, since starting their library is slow."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
