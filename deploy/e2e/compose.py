"""A compose project of its own: commands, files, and what can be asked of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import elsewhere
from api import Api

DEPLOY = Path(__file__).parents[1]
PROJECT = "cortex-e2e"
PORTS = ("HTTP", "COORDINATOR", "DISCOVERY", "ENROLMENT", "WEBSOCKET", "TENSORBOARD", "PROMETHEUS")


@dataclass(frozen=True)
class Compose:
    """A project of its own, on ports of its own."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **environment: str) -> str:
        """`docker compose …`."""
        return self.docker("compose", *arguments, **environment)

    def docker(self, *arguments: str, **environment: str) -> str:
        """`docker …`."""
        every = {**os.environ, **self.environment, **environment}
        done = subprocess.run(["docker", *arguments], check=False, text=True, capture_output=True, env=every)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr[-2000:]}"
        return done.stdout

    def up(self) -> None:
        """Start, wait until everything is healthy, fetch the operator's files."""
        self.run("up", "--detach", "--wait", "--no-build", "--scale", "worker=4")
        self.run("cp", "init:/identities/operator/.", str(self.folder))

    def container(self, name: str) -> str:
        """Its full name."""
        return f"{PROJECT}-{name}"

    def network(self, name: str) -> str:
        """A network's full name."""
        return f"{PROJECT}_{name}"

    def containers(self, *, stopped: bool = False) -> list[str]:
        """Names, less the project's, of those that run, and of those that stopped."""
        which = ("--all",) if stopped else ()
        of_project = f"label=com.docker.compose.project={PROJECT}"
        names = self.docker("ps", *which, "--filter", of_project, "--format", "{{.Names}}")
        return sorted(name.removeprefix(f"{PROJECT}-") for name in names.split())

    def is_well(self) -> bool:
        """Whether every service runs and says by its health check that it can work."""
        every = [self.container(name) for name in self.containers(stopped=True)]
        states = self.docker("inspect", "--format", "{{with .State.Health}}{{.Status}}{{end}}", *every).split()
        return states == ["healthy"] * len(states)

    def label(self, name: str, label: str) -> str:
        """A label of its image."""
        form = f'{{{{index .Config.Labels "{label}"}}}}'
        return self.docker("inspect", "--format", form, self.container(name)).strip()

    def build(self, name: str, dockerfile: str) -> None:
        """An image of that name."""
        command = ["docker", "build", "--quiet", "--tag", name, "-"]
        subprocess.run(command, check=True, text=True, input=dockerfile, stdout=subprocess.DEVNULL)

    def at(self, what: str) -> str:
        """host:port of a published port."""
        return f"127.0.0.1:{self.environment[f'{what}_PORT']}"

    @contextmanager
    def worker_elsewhere(self, name: str, region: str) -> Iterator[None]:
        """A worker outside all containers."""
        token = self.cortex("node", "token", "--gateway", "--name", name, "--region", region).strip()
        with elsewhere.worker(self.folder, name, region, token=token, url=f"ws://{self.at('WEBSOCKET')}"):
            yield

    @property
    def api(self) -> Api:
        """The gateway, for the operator."""
        return Api(f"http://{self.at('HTTP')}", (self.folder / "token").read_text().strip())

    def cortex(self, *arguments: str) -> str:
        """The `cortex` command, with the operator's certificate."""
        services = {"ENDPOINT": self.at("COORDINATOR"), "DISCOVERY": self.at("DISCOVERY")}
        return elsewhere.cortex(self.folder, *arguments, **services)


@contextmanager
def running(folder: Path, *profiles: str, **settings: str) -> Iterator[Compose]:
    """Everything but what is in profiles, and those profiles named here, each with its own file on top of the first.

    The settings are variables of these files. Containers, networks and volumes are removed afterwards, and before if
    any were left.
    """
    ports = {f"{name}_PORT": str(port) for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True)}
    environment = {"COMPOSE_PROJECT_NAME": PROJECT, "CORTEX_SECRETS": str(folder / "secrets"), **ports, **settings}
    files = [str(DEPLOY / f"docker-compose{more}.yml") for more in ("", *(f".{profile}" for profile in profiles))]
    environment |= {"COMPOSE_FILE": ":".join(files), "COMPOSE_PROFILES": ",".join(profiles)}
    subprocess.run([DEPLOY / "secrets.sh"], check=True, env={**os.environ, **environment})
    compose = Compose(folder, environment)
    # Whoever is told to end removes what was started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    down = ("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")
    compose.run(*down)
    try:
        compose.up()
        yield compose
    finally:
        compose.run(*down)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
