"""Stopping, killing, and what the disk held meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cortex_common.errors import OverloadedError, PreconditionError, UnavailableError
from cortex_common.identity import Role, TlsFiles
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from tests.integration.aggregator.harness import JOB, Cluster, arena_of, settings_for
from tests.integration.aggregator.test_uploads import RawUpload, cut_after, sealed_chunks


async def to_its_end(watch: Any) -> None:
    while isinstance(await watch.read(), aggregator_pb2.WatchRoundResponse):
        pass


async def test_stopping_ends_uploads_and_watches_and_loses_nothing(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    header, arena = cluster.header(1, base), arena_of(2)
    upload = RawUpload(cluster, header)
    await upload.begin()
    watch = cluster.rounds.WatchRound(aggregator_pb2.WatchRoundRequest(job_id=JOB, round=1))
    await watch.read()
    assert cluster._stop is not None
    assert cluster._task is not None
    cluster._stop.set()
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError, match="resume when it is back"):
            await upload.error()
        with pytest.raises(UnavailableError, match="watch again"), calling("aggregator"):
            await to_its_end(watch)
    await cluster._task
    await cluster.restart()
    await cluster.open(1, base)
    assert (await cluster.push(header, arena)).receipt.newly_accepted


async def test_an_accepted_update_whose_chunks_are_gone_is_not_claimed(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    receipt = (await cluster.push(cluster.header(1, base), arena_of(2))).receipt
    await cluster.stop()
    os.truncate(cluster.spool(1) / "seat-0.update", 5000)
    await cluster.start()
    with pytest.raises(PreconditionError, match="no update of seat 0"), calling("aggregator"):
        await cluster.seal(1, [receipt])
    await cluster.open(1, base)
    assert (await cluster.push(cluster.header(1, base), arena_of(2))).receipt.newly_accepted


async def test_a_seal_that_met_a_full_disk_can_be_repeated(
    cluster: Cluster, file_size_limit: Callable[[int], None]
) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    receipt = (await cluster.push(cluster.header(1, base), arena_of(2))).receipt
    file_size_limit(6000)
    with pytest.raises(OverloadedError, match=r"versions/job-1: no room for \d+ bytes"), calling("aggregator"):
        await cluster.seal(1, [receipt])
    file_size_limit(resource.RLIM_INFINITY)
    versions = cluster.settings.state_dir / "versions" / JOB
    assert sorted(path.suffix for path in versions.iterdir()) == [".blob", ".json"]
    sealed = await cluster.seal(1, [receipt])
    assert (await cluster.pull(sealed.version.sha256)).arena is not None


@dataclass
class KillableCluster(Cluster):
    """The aggregator as a process of its own."""

    process: asyncio.subprocess.Process | None = None

    def program(self, config: Path) -> str:
        return f"from services.aggregator.main import main; from pathlib import Path; exit(main(Path({str(config)!r})))"

    async def start(self) -> None:
        folder = self.settings.state_dir.parent
        ready, config = folder / "ready.json", folder / "aggregator.yaml"
        ready.unlink(missing_ok=True)
        settings = self.settings.model_copy(update={"ready_file": ready, "parent_pid": os.getpid()})
        config.write_text(settings.model_dump_json(exclude_none=True))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", self.program(config), env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(30):
            while not ready.exists():
                assert self.process.returncode is None, "the aggregator ended at its start"
                await asyncio.sleep(0.02)
        self.address = json.loads(ready.read_text())["address"]
        await self.meet()

    async def close_channels(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    async def end(self, number: signal.Signals) -> int:
        await self.close_channels()
        assert self.process is not None
        self.process.send_signal(number)
        return await self.process.wait()

    async def stop(self) -> None:
        assert await self.end(signal.SIGTERM) == 0


@pytest.fixture
async def killable(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[KillableCluster]:
    settings = settings_for(tls_of(Role.AGGREGATOR, "aggregator-1"), tmp_path / "state")
    cluster = KillableCluster(tls_of, settings)
    await cluster.start()
    yield cluster
    await cluster.stop()


async def test_kill_9_loses_no_accepted_update_and_no_chunk_on_the_disk(killable: KillableCluster) -> None:
    cluster = killable
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base, seats=2)
    accepted = (await cluster.push(cluster.header(1, base, 1), arena_of(2))).receipt
    header, arena = cluster.header(1, base), arena_of(3)
    await cut_after(cluster, header, arena, 2)
    await cluster.end(signal.SIGKILL)
    await cluster.start()
    await cluster.open(1, base, seats=2)
    result = await cluster.push(header, arena)
    assert result.bytes_up < sum(len(each) for each in sealed_chunks(cluster, header, arena)[2:]) + 100
    sealed = await cluster.seal(1, [result.receipt, accepted])
    await cluster.end(signal.SIGKILL)
    await cluster.start()
    assert (await cluster.seal(1, [accepted, result.receipt])).version == sealed.version
    assert (await cluster.pull(sealed.version.sha256)).arena is not None
