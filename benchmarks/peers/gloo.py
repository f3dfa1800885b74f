"""torch.distributed over Gloo: no services, no spool, no encryption; what the same work costs at least."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from benchmarks.network import child_environment
from benchmarks.peers.nest import Nest, nest
from benchmarks.peers.peer import Peer
from benchmarks.peers.tasks import APPS, TaskFile


class Gloo(Peer):
    """Processes that exist as long as the task."""

    null_algorithm = "allreduce"

    def __init__(self, place: Nest, task: TaskFile, workers: int) -> None:
        super().__init__(place, task, {"torch": version("torch")})
        self._workers = workers

    def submit(self) -> None:
        """Start all ranks; their start-up is not counted."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._workers}"]
        self._nest.start("gloo", [*launch, str(APPS / "gloo.py")])

    def settle(self) -> None:
        """Until all ranks have ended."""
        self._nest.wait_until_gone("torch.distributed.run")

    def is_server(self, command_line: str) -> bool:
        """There is none: what a rank holds."""
        return False


@contextmanager
def gloo(workers: int) -> Iterator[Gloo]:
    """Nothing is started yet."""
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name)
        task = TaskFile(directory)
        variables = child_environment() | {
            "BENCHMARK_TASK": str(task.path),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(APPS),
        }
        with nest(directory, variables) as place:
            yield Gloo(place, task, workers)
