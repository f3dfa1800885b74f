"""NVFlare in its POC mode: a server and a client process for each site, mutual TLS among them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environments import Environment, environment_of
from benchmarks.peers.nest import Nest, nest
from benchmarks.peers.peer import Peer
from benchmarks.peers.tasks import APPS, TaskFile

_ADMINISTRATOR = "admin@nvidia.com"
_START_S = 120.0


class NVFlare(Peer):
    """A server with its sites connected."""

    def __init__(self, place: Nest, task: TaskFile, environment: Environment) -> None:
        super().__init__(place, task, environment.versions)
        self._environment = environment

    def submit(self) -> None:
        """Write the job, then `nvflare job submit`; what comes before the submission is nobody's waiting time."""
        jobs = self._nest.directory / "jobs"
        shutil.rmtree(jobs, ignore_errors=True)
        self._nest.call("export", [self._environment.python, str(APPS / "nvflare_job.py"), str(jobs)])
        kit = next((self._nest.directory / "poc").glob(f"*/prod_00/{_ADMINISTRATOR}"))
        submit = ["job", "submit", "--job-folder", str(jobs / "bench"), "--startup-kit", str(kit)]
        self._nest.call("submit", [self._environment.program("nvflare"), *submit])

    def settle(self) -> None:
        """Until the job's processes have gone."""
        self._nest.wait_until_gone("runner_process")

    def is_server(self, command_line: str) -> bool:
        """The server and the process it starts for the job."""
        return "nvflare.private.fed.app.server" in command_line


@contextmanager
def nvflare(workers: int) -> Iterator[NVFlare]:
    """Start it, with everybody connected."""
    environment = environment_of("nvflare")
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name)
        task = TaskFile(directory)
        variables = environment.variables() | {
            "BENCHMARK_TASK": str(task.path),
            "HOME": str(directory),
            "NVFLARE_POC_WORKSPACE": str(directory / "poc"),
            "PYTHONPATH": str(APPS),
        }
        with nest(directory, variables) as place:
            program = environment.program("nvflare")
            place.call("prepare", [program, "poc", "prepare", "-n", str(workers), "--force"])
            place.call("start", [program, "poc", "start", "--timeout", f"{_START_S:.0f}"], _START_S)
            peer = NVFlare(place, task, environment)
            peer.warm_up(workers)
            yield peer
