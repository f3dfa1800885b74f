"""The machine and the versions a figure was measured with."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import cores

_PACKAGES = ("cortex-training", "torch", "numpy", "grpcio", "cryptography", "lz4", "protobuf")
_BLOCK_BYTES = 32 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20}


def describe() -> dict[str, Any]:
    """Everything a reader needs to judge a figure, and nothing that names the machine."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "load_average": load_average(),
        "speed": _speed(),
    }


def cache_bytes() -> int:
    """Of the largest cache the first core has, shared ones included; 0 where the system does not tell."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=0)


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _speed() -> dict[str, float]:
    """What one core did just then, the best of three tries: processors of one name differ by a factor of two.

    `python_ms` is the CPU time of a loop of a million additions, `sha256_gb_per_s` and `copy_gb_per_s` are of 32 MiB.
    """
    block = bytearray(_BLOCK_BYTES)
    copy = bytearray(_BLOCK_BYTES)

    def python() -> None:
        total = 0
        for number in range(1_000_000):
            total += number & 255

    def copied() -> None:
        copy[:] = block

    best = {work: min(_cpu_s(work) for _ in range(3)) for work in (python, copied, lambda: hashlib.sha256(block))}
    python_s, copy_s, digest_s = best.values()
    gigabytes = _BLOCK_BYTES / 1e9
    return {
        "python_ms": round(1000 * python_s, 1),
        "sha256_gb_per_s": round(gigabytes / digest_s, 2),
        "copy_gb_per_s": round(gigabytes / copy_s, 1),
    }


def _cpu_s(work: Callable[[], object]) -> float:
    before_s = time.process_time()
    work()
    return time.process_time() - before_s


def speed_note(facts: Mapping[str, Any]) -> str:
    """How fast a core was, for a table's last line; nothing for results that do not tell."""
    if not (speed := facts.get("speed")):
        return ""
    return (
        f", a core: a million additions in Python {speed['python_ms']:g} ms, "
        f"SHA-256 {speed['sha256_gb_per_s']:g} GB/s, copy {speed['copy_gb_per_s']:g} GB/s"
    )


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or sys.platform


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
