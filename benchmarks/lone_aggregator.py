"""A real aggregator process with nothing else around it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from benchmarks.certificates import HOST, NETWORK, Certificates
from benchmarks.network import BenchmarkError, child_environment
from cortex_common.clock import SystemClock
from cortex_common.errors import CortexError
from cortex_common.identity import Role

NAME = "aggregator-bench"
_START_S = 60.0
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class LoneAggregator:
    """A process that serves."""

    pid: int
    address: str


@contextmanager
def lone_aggregator(directory: Path, certificates: Certificates) -> Iterator[LoneAggregator]:
    """Start an aggregator with an empty state, and end it with the block.

    Raises:
        BenchmarkError: it does not start.
    """
    tls = certificates.of(Role.AGGREGATOR, NAME)
    ready, log_path, config = directory / "ready.json", directory / "aggregator.log", directory / "aggregator.yaml"
    settings = {
        "network": NETWORK,
        "name": NAME,
        "host": HOST,
        "ca": str(tls.ca),
        "certificate": str(tls.certificate),
        "key": str(tls.key),
        "state_dir": str(directory / "state"),
        "ready_file": str(ready),
        "log_level": "WARNING",
    }
    config.write_text(yaml.safe_dump(settings))
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cortex", "serve", "aggregator", "--config", str(config)],
            env={"MALLOC_ARENA_MAX": "2", **child_environment()},
            stdout=log,
            stderr=log,
        )
    try:
        yield LoneAggregator(process.pid, _address(process, ready, log_path))
    except (grpc.RpcError, CortexError) as error:
        raise BenchmarkError(f"the aggregator failed: {error}\n{_end_of(log_path)}") from error
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], ready: Path, log_path: Path) -> str:
    clock = SystemClock()
    end_s = clock.monotonic_s() + _START_S
    while clock.monotonic_s() < end_s:
        if ready.exists():
            return str(json.loads(ready.read_text())["address"])
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    raise BenchmarkError(f"the aggregator does not start:\n{_end_of(log_path)}")


def _end_of(log_path: Path) -> str:
    return log_path.read_text(errors="replace")[-2000:]
