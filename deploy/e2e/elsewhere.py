"""What a person uses outside all containers: the `cortex` command, and a worker of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CORTEX = str(Path(__file__).parents[2] / os.environ.get("VENV", ".venv") / "bin" / "cortex")


def cortex(identity: Path, *arguments: str, **endpoints: str) -> str:
    """The `cortex` command with the certificate in that folder; ENDPOINT and DISCOVERY say where the services are."""
    files = {"CA": "ca.pem", "CERTIFICATE": "tls.crt", "KEY": "tls.key"}
    settings = {name: str(identity / file) for name, file in files.items()} | endpoints
    command, every = [CORTEX, *arguments], _environment(settings)
    done = subprocess.run(command, check=False, text=True, capture_output=True, env=every)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def worker(folder: Path, name: str, region: str, *, token: str, url: str) -> Iterator[None]:
    """A worker that has a node token and the URL of the WebSocket port, nothing more; its state is in the folder."""
    settings = {"NAME": name, "REGION": region, "STATE_DIR": str(folder / name), "NODE_TOKEN": token}
    environment, log = _environment(settings | {"GATEWAY_URL": url}), folder / f"{name}.log"
    with log.open("w") as written:
        process = subprocess.Popen([CORTEX, "serve", "worker"], env=environment, stdout=written, stderr=written)
        try:
            yield
        finally:
            process.terminate()
            code = process.wait(timeout=60)
    assert code == 0, log.read_text()[-2000:]


def _environment(settings: dict[str, str]) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
    return others | {f"CORTEX_{name}": value for name, value in settings.items()}
