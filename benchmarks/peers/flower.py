"""Flower, deployed: a SuperLink and a SuperNode for each client, as separate processes, without TLS."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environments import Environment, environment_of
from benchmarks.peers.nest import Nest, nest
from benchmarks.peers.peer import Peer
from benchmarks.peers.ports import HOST, free_port, wait_for
from benchmarks.peers.tasks import APPS, TaskFile


class Flower(Peer):
    """A SuperLink that listens, and SuperNodes that look for it."""

    def __init__(self, place: Nest, task: TaskFile, environment: Environment, app: Path) -> None:
        super().__init__(place, task, environment.versions)
        self._environment = environment
        self._app = app

    def submit(self) -> None:
        """`flwr run`."""
        self._nest.call("run", [self._environment.program("flwr"), "run", str(self._app), "bench"])

    def settle(self) -> None:
        """Until the ServerApp has gone."""
        self._nest.wait_until_gone("flwr-serverapp")

    def is_server(self, command_line: str) -> bool:
        """The SuperLink, and the ServerApp that it starts."""
        return "flower-superlink" in command_line or "flwr-serverapp" in command_line


@contextmanager
def flower(workers: int) -> Iterator[Flower]:
    """Start it, with everybody connected."""
    environment = environment_of("flower")
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as name:
        directory = Path(name)
        app = directory / "app"
        shutil.copytree(APPS / "flower", app)
        task = TaskFile(directory)
        port = free_port()
        home = directory / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{HOST}:{port}"\ninsecure = true\n'
        )
        variables = environment.variables() | {
            "BENCHMARK_TASK": str(task.path),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": str(APPS),
        }
        with nest(directory, variables) as place:
            _start(place, environment, port, workers)
            peer = Flower(place, task, environment, app)
            peer.warm_up(workers)
            yield peer


def _start(place: Nest, environment: Environment, port: int, workers: int) -> None:
    address = f"{HOST}:{port}"
    superlink = [environment.program("flower-superlink"), "--insecure", "--disable-runtime-dependency-installation"]
    place.start("superlink", [*superlink, "--host", HOST, "--port", str(port)])
    wait_for(port, place.check)
    for seat in range(workers):
        supernode = [environment.program("flower-supernode"), "--insecure", "--superlink", address]
        where = ["--port", str(free_port()), "--node-config", f"seat={seat}"]
        place.start(f"supernode-{seat}", [*supernode, *where])
