"""What rounds cost a worker in memory, above training: the base version and windows, never another copy."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from benchmarks.processes import peak_of_all, reset_peak, tree_of
from cortex_common.codec import CODECS, WeightCompressor, warm_up
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import JobSpec
from tests.integration.worker.harness import Network, TlsOf, network_of
from tests.waiting import eventually

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc"),
]

# So large that the C library takes its widest layer from the system and gives it back: what it keeps of smaller ones it
# keeps without rounds too.
WIDTH = 3000
SMALL_WIDTH = 8
MODEL_BYTES = 4 * (WIDTH * WIDTH + 76 * WIDTH + 10)
# The base version, and half a model to spare; what windows and chunks in work take does not grow with the model.
ALLOWED_BYTES = 1.5 * MODEL_BYTES + 8e6
# Every buffer goes back to the system when it is freed: none can hide in what an earlier one left.
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass
class WorkerProcess:
    """A worker that is a process of its own, so that its memory can be told from the test's."""

    network: Network
    pid: int
    log: Path

    def has_compiled(self, codec: str) -> bool:
        """Whether its log says that the loops of a codec are compiled."""
        return any(
            "codec_compiled" in line and f'"codec": "{codec}"' in line for line in self.log.read_text().splitlines()
        )

    async def peak_of(self, spec: JobSpec, job_id: str) -> int:
        """Peak of all its processes over rounds of a job, once every loop is compiled and every page touched."""
        net = self.network
        net.job_id, net.round = job_id, 0
        net.base = await net.first_version(spec)
        await self._round(spec)
        if spec.compression.codec != "none":
            await eventually(lambda: self.has_compiled(spec.compression.codec), 60)
        await self._round(spec)
        processes = tree_of(self.pid)
        for pid in processes:
            reset_peak(pid)
        # After a round without a codec for the way down the version comes whole, after the others as a delta.
        for download in ("none", spec.compression.codec, spec.compression.codec):
            await self._round(spec, download)
        return peak_of_all(processes)

    async def _round(self, spec: JobSpec, download: str = "none") -> None:
        net, codec = self.network, spec.compression.codec
        net.round += 1
        await net.open_round(net.round, ["w1"], net.base, codec=codec, download=download)
        trained = await net.coordinator.report_on(await net.hand_out(spec), "trained")
        net.base = await net.seal(net.round, trained)


@asynccontextmanager
async def worker_process(network: Network) -> AsyncIterator[WorkerProcess]:
    log, config = network.folder / "worker.log", network.folder / "worker.yaml"
    access = await network.access("w1", network.coordinator_address)
    token = access.pop("node_token", None)
    if token is not None:
        token_file = network.folder / "token"
        token_file.write_text(token)
        token_file.chmod(0o600)
        access["node_token_file"] = token_file
    folders = {"state_dir": network.folder / "w1", "cache_dir": network.folder / "cache"}
    settings = {"name": "w1", "log_level": "INFO", "metrics_port": 0, **access, **folders}
    config.write_text(
        yaml.safe_dump({key: value if isinstance(value, int) else str(value) for key, value in settings.items()})
    )
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex", "serve", "worker", "--config", str(config)),
            env={**os.environ, **ALLOCATOR},
            stdout=out,
            stderr=out,
        )
    try:
        yield WorkerProcess(network, process.pid, log)
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def worker_over(transport: str, tls_of: TlsOf, folder: Path) -> AsyncIterator[WorkerProcess]:
    async with network_of(tls_of, folder, transport) as network, worker_process(network) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tls_of: TlsOf, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerProcess]:
    async with worker_over("grpc", tls_of, tmp_path_factory.mktemp("memory")) as running:
        yield running


def job(codec: str, width: int) -> JobSpec:
    return parse_job(
        {
            "model": {"input_dim": 64, "hidden_dims": [width, width], "output_dim": 10},
            "data": {"train": "digits"},
            "training": {"optimizer": "sgd", "learning_rate": 0.01, "batch_size": 1, "local_steps": 1},
            "compression": {"codec": codec, "download": {"codec": codec}},
        }
    )


async def above_training(worker: WorkerProcess, codec: str) -> int:
    """Bytes that rounds cost on top of training, and of what a worker takes that has next to nothing to train."""
    warm_up(WeightCompressor.create(codec))
    idle_bytes = await worker.peak_of(job(codec, SMALL_WIDTH), f"small-{codec}")
    peak_bytes = await worker.peak_of(job(codec, WIDTH), f"large-{codec}")
    # Whoever trains by plain SGD holds the weights and their gradients, with rounds or without.
    return peak_bytes - idle_bytes - 2 * MODEL_BYTES


@pytest.mark.parametrize("codec", CODECS)
async def test_rounds_cost_a_worker_at_most_one_and_a_half_models_more_than_training(
    worker: WorkerProcess, codec: str
) -> None:
    assert await above_training(worker, codec) <= ALLOWED_BYTES


async def test_rounds_through_a_gateway_cost_no_more(tls_of: TlsOf, tmp_path: Path) -> None:
    async with worker_over("websocket", tls_of, tmp_path) as worker:
        assert await above_training(worker, "int8") <= ALLOWED_BYTES
