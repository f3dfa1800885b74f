"""A worker with a certificate, killed in the middle of an upload: with `keep_updates` it does not train again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from cortex_common.job.parse import parse_job
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.worker.trainer.examples import DataCache
from tests.integration.stores.servers import free_port
from tests.integration.worker.harness import Network, TlsOf, network_of
from tests.links import CountedLink, over
from tests.recomputed import digests
from tests.waiting import eventually

JOB = parse_job(
    {
        "model": {"input_dim": 64, "hidden_dims": [1024, 1024], "output_dim": 10},
        "data": {"train": "digits"},
        "training": {"learning_rate": 0.01, "rounds": 1, "seed": 3, "local_steps": 8},
    }
)
CHUNK_BYTES = 4 * DEFAULT_CHUNK_ELEMENTS


@pytest.fixture
async def network(tls_of: TlsOf, tmp_path: Path) -> AsyncIterator[Network]:
    async with network_of(tls_of, tmp_path) as made:
        yield made


@contextmanager
def _process(settings: dict[str, Any], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker as `cortex serve` runs it; killed at the end of the block, if it has not been before."""
    config = folder / "worker.yaml"
    config.write_text(yaml.safe_dump({key: str(value) for key, value in settings.items()}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "cortex", "serve", "worker", "--config", str(config)]
    with (folder / "worker.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@asynccontextmanager
async def _broken_off(network: Network, settings: dict[str, Any]) -> AsyncIterator[tuple[Any, str]]:
    """What is wanted of w1, and to where: it was killed when one chunk of its update had arrived."""
    link, (host, port) = CountedLink(bytes_per_s=50e6), network.aggregator_address.split(":")
    async with over(link, lambda: (host, int(port))) as address:
        with _process(settings, network.folder):
            network.base = await network.first_version(JOB)
            await network.open_round(1, ["w1"], network.base)
            link.hold_bytes = link.up_bytes + CHUNK_BYTES + 200_000
            train = network.assignment(JOB, 1, network.base, train={}, aggregator_address=address)
            await network.coordinator.assign("w1", train)
            await eventually(lambda: link.up_bytes > (link.hold_bytes or 0) and _here(network) > CHUNK_BYTES // 2, 90)
        link.hold_bytes = None
        yield train, address


def _here(network: Network) -> int:
    """Bytes that the aggregator has of the update of round 1: whole chunks, and the header."""
    return sum(path.stat().st_size for path in (network.folder / "aggregator").rglob("1-0/seat-0.update"))


def _steps(port: int) -> float:
    """Optimiser steps that the worker at this operations port has asked for since its start."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("cortex_worker_training_steps_total ")]
    return float(line.split()[1])


@pytest.mark.parametrize("keep_updates", [True, False])
async def test_a_killed_worker_trains_again_unless_it_keeps_its_updates(network: Network, keep_updates: bool) -> None:
    access, port = await network.access("w1", network.coordinator_address), free_port()
    folders = {"state_dir": network.folder / "w1", "cache_dir": network.folder / "cache"}
    settings = {"name": "w1", "metrics_port": port, "keep_updates": keep_updates, **access, **folders}
    async with _broken_off(network, settings) as (train, _):
        here_bytes, kept = _here(network), list((network.folder / "w1").rglob("sealed.update"))
        assert len(kept) == keep_updates
        whole_bytes = kept[0].stat().st_size if kept else 0
        network.coordinator.reports.clear()
        with _process(settings, network.folder):
            report = await network.coordinator.report_on(train, "trained")
            steps = await asyncio.to_thread(_steps, port)
    assert report.trained.steps == 8
    assert steps == (0 if keep_updates else 8)
    if keep_updates:
        assert report.trained.bytes_up < whole_bytes - here_bytes + 10_000
    version = await network.seal(1, report)
    examples = DataCache(JOB, network.folder / "cache", None).training_part(0, 1, torch.device("cpu"))
    assert [version] == digests(JOB, [examples])
    assert not list((network.folder / "w1").rglob("sealed.update"))
