"""The node in JavaScript, written from docs/websocket.md: it initialises a model, trains in a round, and is counted."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from cortex_common.data import load
from cortex_common.identity import Role, TlsFiles
from cortex_common.job.parse import parse_job
from cortex_common.pb.v1 import coordinator_pb2
from tests.architecture.sources import ROOT
from tests.integration.worker.harness import Network, network_of

EXAMPLE = ROOT / "examples" / "websocket-node"
JOB = parse_job(
    {
        "name": "digits",
        "model": {"input_dim": 64, "output_dim": 10},
        "data": {"train": "digits", "test": "digits-test"},
        "training": {"learning_rate": 0.01},
    }
)


def test_it_is_short_and_stands_on_ws_alone() -> None:
    source = "".join(path.read_text() for path in sorted(EXAMPLE.glob("*.js")))
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("//")]
    assert len(code) <= 200
    assert set(re.findall(r'^import .* from "(.+)";$', source, re.MULTILINE)) == {
        "node:crypto",
        "node:fs",
        "ws",
        "./wire.js",
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its one package."""
    folder = tmp_path_factory.mktemp("node") / "websocket-node"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    if shutil.which("node") is None or shutil.which("npm") is None:
        not_run("node and npm are not on this machine")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    if done.returncode:
        not_run(f"npm cannot install ws here: {done.stderr[-300:]}")
    return folder


def not_run(reason: str) -> None:
    warnings.warn(f"THE JAVASCRIPT NODE WAS NOT TESTED: {reason}", stacklevel=2)
    pytest.skip(reason)


@asynccontextmanager
async def javascript(folder: Path, network: Network, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The node at a gateway in front of the network's coordinator, with the digits as its data."""
    assert network.nodes is not None
    inputs, labels = load("digits", network.folder / "cache", None).take(slice(None))
    table = np.column_stack([labels, inputs.reshape(len(labels), -1)])
    np.savetxt(folder / "digits.csv", table, delimiter=",", fmt="%.6g")
    token = (await network.nodes.token(name)).encode()
    async with network.nodes.gateway(network.coordinator_address) as url:
        arguments = ["node.js", url, token, name, "eu", "digits", "digits.csv"]
        process = await asyncio.create_subprocess_exec("node", *arguments, cwd=folder)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            assert await process.wait() == 0, "it leaves on SIGTERM"


async def test_it_takes_part_in_a_round_beside_a_worker_of_ours(
    installed: Path, tls_of: Callable[[Role, str], TlsFiles], tmp_path: Path
) -> None:
    async with network_of(tls_of, tmp_path, "websocket") as network, javascript(installed, network, "js-1"):
        coordinator = network.coordinator
        base = await network.first_version(JOB, "js-1")
        await coordinator.assign("js-1")
        await network.worker("w1")
        for number in (1, 2):
            await network.open_round(number, ["js-1", "w1"], base)
            works = [
                network.assignment(JOB, number, base, train=coordinator_pb2.TrainWork(), seat=seat, seats=2)
                for seat in (0, 1)
            ]
            await coordinator.assign("js-1", works[0])
            await coordinator.assign("w1", works[1])
            reports = [await coordinator.report_on(work, "trained") for work in works]
            assert [each.trained.receipt.worker for each in reports] == ["js-1", "w1"]
            assert reports[0].trained.receipt.newly_accepted
            assert (reports[0].trained.receipt.weight, reports[0].trained.steps) == (719, 719)
            assert 0 < reports[0].trained.metrics["train_loss"] < 2.3
            alone = base
            base = await network.seal(number, *reports)
            assert base != alone
        slices = coordinator_pb2.EvaluateWork(slice=[0], slices=1)
        evaluate = network.assignment(JOB, 3, base, evaluate=slices)
        await coordinator.assign("w1", evaluate)
        (score,) = (await coordinator.report_on(evaluate, "evaluated")).evaluated.slices
        assert score.correct / score.examples > 0.9
