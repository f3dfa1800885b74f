"""A real local network for a measurement: `cortex up` in a directory of its own, gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Usage, peak_bytes, tree_of, usage_of
from cortex.local.layout import Layout
from cortex.local.status import read_report
from cortex_common.clock import SystemClock

ROOT = Path(__file__).resolve().parents[1]
_SETTLED_WITHIN_S = 180.0
_QUIET_FOR_S = 1.0
_QUIET_CORES = 0.15
"""What heartbeats and health checks of a network without a job take, and some room."""


class BenchmarkError(RuntimeError):
    """Something that was to be measured did not work."""


def child_environment(path: Sequence[Path] = ()) -> dict[str, str]:
    """This process's environment, with the import roots of this checkout; nothing that points at another network.

    Args:
        path: Import roots that come before all others.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
    roots = [*map(str, path), str(ROOT / "libs"), str(ROOT), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in dict.fromkeys(roots) if path)}


@dataclass(frozen=True, slots=True)
class RunningNetwork:
    """A network whose services are all healthy. `up_s` is how long `cortex up --detach` took."""

    directory: Path
    up_s: float

    def groups(self) -> dict[str, frozenset[int]]:
        """Process ids by what they do; what they started is below them."""
        report = read_report(Layout.of(self.directory))
        if report is None:
            raise BenchmarkError(f"no supervisor runs in {self.directory}")
        groups: dict[str, set[int]] = {"supervisor": {report.supervisor.pid}}
        services = {"discovery", "coordinator", "gateway"}
        for entry in report.processes:
            if entry.process is None:
                raise BenchmarkError(f"{entry.name} is down ({entry.last_exit})")
            group = entry.name if entry.name in services else entry.name.partition("-")[0]
            group = "aggregators" if group == "aggregator" else group if group in services else "workers"
            groups.setdefault(group, set()).add(entry.process.pid)
        return {name: frozenset(pids) for name, pids in groups.items()}

    def trainers(self) -> frozenset[int]:
        """Process ids of the trainers, which are children of their workers."""
        workers = self.groups()["workers"]
        return frozenset().union(*(tree_of(pid) for pid in workers)) - workers

    def usage(self) -> Usage:
        """CPU time of all its processes until now; a worker's includes that of its trainers."""
        return usage_of(self.groups())

    def settle(self) -> None:
        """Wait until nothing goes on in it: just after a start its workers' processes are still loading PyTorch.

        Raises:
            BenchmarkError: it never is quiet.
        """
        clock = SystemClock()
        deadline_s = clock.monotonic_s() + _SETTLED_WITHIN_S
        before = self.usage()
        while clock.monotonic_s() < deadline_s:
            time.sleep(_QUIET_FOR_S)
            now = self.usage()
            used = now.since(before)
            if used.total_s < _QUIET_CORES * used.at_s:
                return
            before = now
        raise BenchmarkError(
            f"the network in {self.directory} is still busy after {_SETTLED_WITHIN_S:g} s without a job"
        )

    def aggregator_peak_bytes(self) -> int:
        """Peak memory of the aggregator that had most to do."""
        return max(peak_bytes(pid) for pid in self.groups()["aggregators"])


@contextmanager
def running_network(workers: int, path: Sequence[Path] = (), regions: str = "") -> Iterator[RunningNetwork]:
    """Start a network on free ports and stop it at the end of the block, whatever happens.

    Args:
        workers: How many.
        path: Import roots of all its processes that come before all others.
        regions: Their names, with commas; those of `cortex up` by default.

    Raises:
        BenchmarkError: it does not become healthy.
    """
    clock = SystemClock()
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name) / "network"
        started_s = clock.monotonic_s()
        try:
            where = ("--regions", regions) if regions else ()
            _cortex("up", "--dir", str(directory), "--workers", str(workers), *where, "--detach", "--json", path=path)
            yield RunningNetwork(directory, clock.monotonic_s() - started_s)
        finally:
            _cortex("down", "--dir", str(directory), check=False)


def _cortex(*arguments: str, check: bool = True, path: Sequence[Path] = ()) -> None:
    command = [sys.executable, "-m", "cortex", *arguments]
    done = subprocess.run(command, env=child_environment(path), capture_output=True, text=True)
    if check and done.returncode:
        raise BenchmarkError(f"cortex {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
