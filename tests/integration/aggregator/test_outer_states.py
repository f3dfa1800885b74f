"""Outer optimisers across rounds, restarts and kills, over real mutual TLS."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cortex_common.errors import CortexError, PreconditionError
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.tensors import Arena
from cortex_common.transfer import Receipt
from tests.integration.aggregator.harness import JOB, MANIFEST, Cluster, arena_of, settings_for
from tests.integration.aggregator.test_restarts import KillableCluster

STATEFUL = ["fedavgm", "diloco", "fedadam"]


async def pushed(cluster: Cluster, number: int, base: str) -> list[Receipt]:
    """Round `number` up to its receipts: two updates, the same at each call."""
    await cluster.open(number, base, seats=2)
    headers = [cluster.header(number, base, seat, 1.0 + seat) for seat in range(2)]
    return [(await cluster.push(h, arena_of(10 * number + h.seat, scale=0.1))).receipt for h in headers]


async def rounds(cluster: Cluster, base: str, numbers: range, restarting: bool = False) -> list[str]:
    """Digests of the versions."""
    digests = []
    for number in numbers:
        receipts = await pushed(cluster, number, base)
        if restarting:
            await cluster.restart()
        base = (await cluster.seal(number, receipts)).version.sha256
        digests.append(base)
    return digests


def files(cluster: Cluster) -> list[str]:
    """Kinds of the files of a job's versions, with their rounds."""
    paths = (cluster.settings.state_dir / "versions" / JOB).iterdir()
    return sorted(f"{path.name.split('-')[0].split('.')[0]}.{path.name.split('.', 1)[1]}" for path in paths)


async def prune(cluster: Cluster, keep: list[int], *, ended: bool = False) -> None:
    request = aggregator_pb2.PruneJobRequest(job_id=JOB, fence=cluster.fence, keep_rounds=keep, ended=ended)
    await cluster.rounds.PruneJob(request)


@pytest.mark.parametrize("strategy", STATEFUL)
async def test_restarts_in_the_middle_of_a_job_change_no_digest(cluster: Cluster, strategy: str) -> None:
    cluster.strategy = strategy
    base = await cluster.first_version(arena_of(1))
    undisturbed = await rounds(cluster, base, range(1, 4))
    await prune(cluster, [], ended=True)
    cluster.fence += 1
    assert await cluster.first_version(arena_of(1)) == base
    assert await rounds(cluster, base, range(1, 4), restarting=True) == undisturbed


async def test_diloco_over_three_rounds_is_nesterov_on_the_mean(cluster: Cluster) -> None:
    cluster.strategy = "diloco"
    first = arena_of(1)
    base = await cluster.first_version(first)
    digests = await rounds(cluster, base, range(1, 4))
    theta, b = first.values.astype(np.float64), np.zeros(MANIFEST.elements)
    for number in range(1, 4):
        deltas = [arena_of(10 * number + seat, scale=0.1).values.astype(np.float64) for seat in range(2)]
        mean = (deltas[0] + 2.0 * deltas[1]) / 3.0
        b = 0.9 * b + mean
        theta += 0.7 * (mean + 0.9 * b)
    pulled = await cluster.pull(digests[-1])
    assert isinstance(pulled.arena, Arena)
    np.testing.assert_allclose(pulled.arena.values, theta, rtol=0, atol=5e-7)


async def test_a_state_is_kept_and_pruned_with_its_version(cluster: Cluster) -> None:
    cluster.strategy = "diloco"
    base = await cluster.first_version(arena_of(1))
    await rounds(cluster, base, range(1, 4))
    states = [f"{number}.{kind}" for number in (1, 2, 3) for kind in ("blob", "json", "state.blob")]
    assert files(cluster) == ["0.blob", "0.json", *states]
    await prune(cluster, [2, 3])
    assert files(cluster) == states[3:]


async def test_a_job_keeps_its_strategy_and_options(cluster: Cluster) -> None:
    cluster.strategy = "diloco"
    base = await cluster.first_version(arena_of(1))
    (first,) = await rounds(cluster, base, range(1, 2))
    for strategy, options in (("fedavg", "{}"), ("fedavgm", "{}"), ("diloco", '{"momentum":0.5}')):
        cluster.strategy, cluster.strategy_options = strategy, options
        with pytest.raises(PreconditionError, match="another strategy is a new job"), calling("aggregator"):
            await cluster.open(2, first)
    cluster.strategy, cluster.strategy_options = "diloco", '{"momentum":0.9}'
    await rounds(cluster, first, range(2, 3))


KILLS = """
import os, sys
from pathlib import Path
import services.aggregator.main as service
from cortex_common.storage import DirectoryBlobStore

class Killing(DirectoryBlobStore):
    def create(self, name):
        writer = super().create(name)
        if name.rsplit("/")[-1].startswith("2") and name.endswith({end!r}) and "state" not in name:
            writer.commit = lambda **_: os.kill(os.getpid(), 9)
        return writer

service.DirectoryBlobStore = Killing
sys.exit(service.main(Path({config!r})))
"""


@dataclass
class KilledCluster(KillableCluster):
    """An aggregator whose process is killed when the second round's blob, or facts, would become visible."""

    dies_at: str = ""

    def program(self, config: Path) -> str:
        return KILLS.format(end=self.dies_at, config=str(config)) if self.dies_at else super().program(config)


@pytest.fixture
async def killed(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[KilledCluster]:
    cluster = KilledCluster(tls_of, settings_for(tls_of(Role.AGGREGATOR, "aggregator-1"), tmp_path / "state"))
    yield cluster
    await cluster.stop()


@pytest.mark.parametrize("dies_at", [".blob", ".json"])
async def test_kill_9_between_state_and_facts_changes_neither(killed: KilledCluster, dies_at: str) -> None:
    cluster = killed
    cluster.strategy, cluster.dies_at = "diloco", dies_at
    await cluster.start()
    base = await cluster.first_version(arena_of(1))
    (first,) = await rounds(cluster, base, range(1, 2))
    receipts = await pushed(cluster, 2, first)
    with pytest.raises(CortexError), calling("aggregator"):
        await cluster.seal(2, receipts)
    assert cluster.process is not None
    assert await cluster.process.wait() == -signal.SIGKILL
    assert "2.state.blob" in files(cluster)
    assert "2.json" not in files(cluster)

    cluster.dies_at = ""
    await cluster.close_channels()
    await cluster.start()
    assert [each for each in files(cluster) if each.startswith("2.")] == []
    await cluster.open(2, first, seats=2)
    second = (await cluster.seal(2, receipts)).version.sha256
    (third,) = await rounds(cluster, second, range(3, 4))
    await prune(cluster, [], ended=True)
    cluster.fence += 1
    assert await cluster.first_version(arena_of(1)) == base
    assert await rounds(cluster, base, range(1, 4)) == [first, second, third]
