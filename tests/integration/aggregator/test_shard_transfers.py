"""Shards of data sets that are cut off, torn, sent by two, dropped half way, or no shards: what is held stays right."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import (
    ConflictError,
    CorruptError,
    InvalidArgumentError,
    OverloadedError,
    UnavailableError,
)
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.rpc import server
from cortex_common.rpc.server import RpcSettings, serving
from cortex_common.security.authority import Authority
from cortex_common.security.objects import ObjectKind
from cortex_common.security.shards import sealed_bytes
from cortex_common.storage import DirectoryBlobStore
from cortex_common.transfer import ChunkFrame, HeaderFrame
from services.aggregator.incoming_shards import IncomingShards
from services.aggregator.servicer import SHARD_SERVICE, ShardServicer
from services.aggregator.shards import ShardStore
from tests.integration.aggregator.harness import Cluster, settings_for
from tests.integration.aggregator.offered import Ann, RawPut, Shard
from tests.integration.aggregator.test_restarts import KillableCluster
from tests.links import CountedLink, CutLink, Link, over

CHUNK = 1 << 20
# On its way beside the window: the message that was being put together, and what two sockets of the proxy hold.
BESIDE_WINDOW = CHUNK + 512 * 1024
CUTS = 2


@pytest.fixture
def ann(cluster: Cluster, tmp_path: Path) -> Ann:
    """With a small shard of nine chunks."""
    return Ann(cluster, Shard.of(tmp_path / "ward", 9 * 4096 - 100, 4096))


def target(cluster: Cluster) -> Callable[[], tuple[str, int]]:
    """Where the aggregator is by then."""

    def found() -> tuple[str, int]:
        host, port = cluster.address.rsplit(":", 1)
        return host, int(port)

    return found


async def test_a_cut_costs_at_most_a_window_and_is_told(cluster: Cluster, tmp_path: Path) -> None:
    ann = Ann(cluster, Shard.of(tmp_path / "ward", 12 * CHUNK))
    link = CutLink(bytes_per_s=1e9)
    async with over(link, target(cluster)) as address:
        shipping = asyncio.create_task(ann.ship(address))
        for cut in range(1, CUTS + 1):
            await ann.until_held(3 * cut)
            await link.cut()
        await shipping
    assert (ann.arrived, ann.is_there()) == ([0], True)
    held = [each.held_bytes for each in ann.cuts]
    assert held[0] >= sealed_bytes(ann.shard.header, 3)
    assert held[-1] >= sealed_bytes(ann.shard.header, 3 * CUTS)
    assert held == sorted(held)
    assert {(each.index, each.size_bytes, each.reason) for each in ann.cuts} == {
        (0, ann.shard.size_bytes, "connection lost")
    }
    # TLS, HTTP/2, handshakes and acknowledgements come to less than 2 % of it.
    size = ann.shard.size_bytes
    assert size < link.passed_bytes < 1.02 * size + CUTS * (server.WINDOW_BYTES + BESIDE_WINDOW)


async def test_a_later_command_goes_on_where_one_was_given_up(cluster: Cluster, tmp_path: Path) -> None:
    ann = Ann(cluster, Shard.of(tmp_path / "ward", 6 * CHUNK), patience_s=0.0)
    link = CutLink(bytes_per_s=1e9)
    async with over(link, target(cluster)) as address:
        shipping = asyncio.create_task(ann.ship(address))
        await ann.until_held(2)
        link.is_cut = True
        with pytest.raises(UnavailableError, match=f"aggregator at {address}"):
            await shipping
    assert (ann.arrived, ann.cuts) == ([], [])
    await ann.ship()
    assert [each.reason for each in ann.cuts] == [""]
    assert ann.cuts[0].held_bytes >= sealed_bytes(ann.shard.header, 2)
    assert (ann.arrived, ann.is_there()) == ([0], True)


async def test_an_upload_outlives_its_connection(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> None:
    """Which a server ends after half an hour, here after a second."""
    settings = settings_for(tls_of(Role.AGGREGATOR, "aggregator-1"), tmp_path / "state")
    incoming = IncomingShards(settings.state_dir / "incoming", 0, 60.0, SystemClock())
    store = ShardStore(DirectoryBlobStore(settings.state_dir / "shards"), incoming, 30.0)
    rules = RpcSettings(
        "127.0.0.1", 0, settings.tls, "cortex", bulk=True, connection_life_s=0.7, connection_grace_s=0.3
    )
    async with serving(rules, [ShardServicer(store).attach], [SHARD_SERVICE]) as running:
        cluster = Cluster(tls_of, settings, address=running.address)
        ann, link = Ann(cluster, Shard.of(tmp_path / "ward", 3 * CHUNK, 64 << 10)), Link(bytes_per_s=1.5e6)
        async with over(link, target(cluster)) as address:
            await ann.ship(address)
    assert ann.cuts
    assert (ann.arrived, ann.is_there()) == ([0], True)


async def test_an_upload_outlives_its_certificate(cluster: Cluster, authority: Authority, tmp_path: Path) -> None:
    life = dt.timedelta(seconds=3)
    operator = Identity("cortex", Role.OPERATOR, NodeName("ann"))
    ann = Ann(cluster, Shard.of(tmp_path / "ward", 2 * CHUNK, 64 << 10))
    ann.tls = authority.issue(operator, [], tmp_path / "ann", life=life)
    link = Link(bytes_per_s=ann.shard.size_bytes / (1.5 * life.total_seconds()))
    async with over(link, target(cluster)) as address:
        shipping = asyncio.create_task(ann.ship(address))
        await ann.until_held(2)
        authority.issue(operator, [], tmp_path / "ann")
        await shipping
    assert [each.reason for each in ann.cuts] == ["certificate replaced"]
    assert (ann.arrived, ann.is_there()) == ([0], True)


async def test_an_aggregator_that_is_nowhere_is_told(ann: Ann) -> None:
    ann.patience_s = 0.0
    with pytest.raises(UnavailableError, match=r"aggregator at 127\.0\.0\.1:1 cannot be reached"):
        await ann.ship("127.0.0.1:1")


async def test_a_stopped_aggregator_keeps_what_came(ann: Ann) -> None:
    put = await ann.begin(4)
    assert ann.cluster._stop is not None
    ann.cluster._stop.set()
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError, match="can be resumed when it is back"):
            await put.error()
    await ann.cluster.restart()
    held = await ann.offer()
    assert (held.complete, held.chunks, held.size_bytes) == (False, 4, sealed_bytes(ann.shard.header, 4))
    await ann.ship()
    assert ann.is_there()


@dataclass
class KilledCluster(KillableCluster):
    """An aggregator whose process is killed when a shard's facts would become visible."""

    dies: bool = False

    def program(self, config: Path) -> str:
        return KILLS.format(config=str(config)) if self.dies else super().program(config)


KILLS = """
import os, sys
from pathlib import Path
import services.aggregator.main as service
from cortex_common.storage import DirectoryBlobStore

class Killing(DirectoryBlobStore):
    def create(self, name):
        writer = super().create(name)
        if name.endswith(".json"):
            writer.commit = lambda **_: os.kill(os.getpid(), 9)
        return writer

service.DirectoryBlobStore = Killing
sys.exit(service.main(Path({config!r})))
"""


@pytest.fixture
async def killable(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[KilledCluster]:
    cluster = KilledCluster(tls_of, settings_for(tls_of(Role.AGGREGATOR, "aggregator-1"), tmp_path / "state"))
    yield cluster
    await cluster.stop()


async def test_kill_9_midway_loses_at_most_a_window(killable: KilledCluster, tmp_path: Path) -> None:
    await killable.start()
    ann = Ann(killable, Shard.of(tmp_path / "ward", 8 * CHUNK), patience_s=60.0)
    link = CountedLink(bytes_per_s=1e9, hold_bytes=5 * CHUNK)
    async with over(link, target(killable)) as address:
        shipping = asyncio.create_task(ann.ship(address))
        await ann.until_held(3)
        link.hold_bytes = None
        await killable.end(signal.SIGKILL)
        await killable.start()
        await shipping
    assert (ann.arrived, ann.is_there()) == ([0], True)
    assert ann.cuts[-1].held_bytes >= sealed_bytes(ann.shard.header, 3)
    assert link.up_bytes < 1.02 * ann.shard.size_bytes + server.WINDOW_BYTES + BESIDE_WINDOW


async def test_kill_9_before_the_facts_costs_nothing(killable: KilledCluster, tmp_path: Path) -> None:
    killable.dies = True
    await killable.start()
    ann = Ann(killable, Shard.of(tmp_path / "ward", 2 * CHUNK), patience_s=60.0)
    link = CountedLink(bytes_per_s=1e9)
    async with over(link, target(killable)) as address:
        shipping = asyncio.create_task(ann.ship(address))
        assert killable.process is not None
        assert await killable.process.wait() == -signal.SIGKILL
        killable.dies = False
        await killable.close_channels()
        await killable.start()
        await shipping
    assert (ann.arrived, ann.is_there()) == ([0], True)
    assert link.up_bytes < 1.1 * ann.shard.size_bytes, "the second time there was only the trailer to be sent"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda ann: os.truncate(ann.incoming, sealed_bytes(ann.shard.header, 6) - 1), 5),
        (lambda ann: os.truncate(ann.incoming, 0), 0),
        (lambda ann: os.truncate(ann.journal, ann.journal.stat().st_size - 1), 5),
        (lambda ann: flip(ann.incoming, sealed_bytes(ann.shard.header, 6) - 1), 5),
        (lambda ann: flip(ann.incoming, sealed_bytes(ann.shard.header, 2)), 2),
        (lambda ann: flip(ann.journal, ann.journal.stat().st_size - 50), 4),
        (lambda ann: flip(ann.journal, 20), 0),
        (lambda ann: ann.journal.write_bytes(b""), 0),
        (lambda ann: ann.journal.unlink(), 0),
        (lambda ann: ann.incoming.unlink(), 0),
        (lambda ann: ann.incoming.write_bytes(ann.incoming.read_bytes() + bytes(10_000)), 6),
        (lambda ann: ann.journal.write_bytes(ann.journal.read_bytes() + bytes(100)), 6),
    ],
)
async def test_a_torn_or_damaged_end_is_cut_off(ann: Ann, damage: Callable[[Ann], Any], left: int) -> None:
    await ann.begin_and_cut(6)
    await ann.cluster.stop()
    damage(ann)
    await ann.cluster.start()
    assert (await ann.offer()).chunks == left
    await ann.ship()
    assert ann.is_there()


async def test_the_newer_of_two_senders_takes_over(ann: Ann) -> None:
    older = await ann.begin(4)
    await ann.ship()
    with pytest.raises(ConflictError, match="a newer upload took over"):
        await older.error()
    assert ann.cuts[0].held_bytes == sealed_bytes(ann.shard.header, 4)
    assert (ann.arrived, ann.is_there()) == ([0], True)


async def test_many_senders_at_once_leave_one_right_shard(cluster: Cluster, tmp_path: Path) -> None:
    shard = Shard.of(tmp_path / "ward", 3 * CHUNK, 64 << 10)
    everybody = [Ann(cluster, shard) for _ in range(3)]
    ends = await asyncio.gather(*(each.ship() for each in everybody), return_exceptions=True)
    assert any(end is None for end in ends)
    assert all(end is None or isinstance(end, ConflictError) for end in ends), ends
    assert everybody[0].is_there()


async def test_what_a_wrong_sender_left_is_never_mixed_into_a_shard(ann: Ann) -> None:
    """A right one finds out at the end, and sends all of it."""
    wrong = RawPut(ann.cluster)
    header, first, second = ann.shard.frames(0, 2)
    assert isinstance(second, ChunkFrame)
    await wrong.send([header, first, replace(second, sealed=bytes(len(second.sealed)))])
    await ann.until_offered(2)
    await ann.ship()
    assert "its chunks are not those of" in ann.cuts[-1].reason
    assert [each.held_bytes for each in ann.cuts] == [sealed_bytes(ann.shard.header, 2), 0]
    assert (ann.arrived, ann.is_there()) == ([0], True)


async def test_a_file_that_is_not_what_was_sealed_is_not_sent_twice(ann: Ann) -> None:
    flip(ann.shard.path, 5000)
    with pytest.raises(CorruptError, match="shard 0 of data set ward: its chunks are not those of"):
        await ann.ship()
    assert ann.cuts == []
    assert not ann.incoming.exists()
    ann.shard.path.unlink()
    with pytest.raises(CorruptError, match=r"0000\.shard is not readable: No such file"):
        await ann.ship()


async def test_chunks_that_are_here_are_passed_over_and_a_gap_is_refused(ann: Ann) -> None:
    await ann.begin_and_cut(4)
    gap = RawPut(ann.cluster)
    await gap.send([HeaderFrame(ann.shard.header, 5)])
    with pytest.raises(CorruptError, match="chunk 5 is offered where chunk 4 is due"):
        await gap.error()
    from_the_start = RawPut(ann.cluster)
    await from_the_start.send(ann.shard.frames())
    assert await from_the_start.finish()
    assert ann.is_there()
    held = await ann.offer()
    assert (held.complete, held.chunks, held.size_bytes) == (True, 9, ann.shard.size_bytes)
    again = RawPut(ann.cluster)
    await again.send(ann.shard.frames(0, 0))
    assert not await again.finish()
    await ann.ship()
    assert ann.arrived == []


async def test_the_same_chunks_under_another_header_begin_anew(ann: Ann) -> None:
    await ann.begin_and_cut(4)
    assert (await ann.offer(salt=bytes(32))).chunks == 0
    assert (await ann.offer()).chunks == 4
    other = RawPut(ann.cluster)
    await other.send([HeaderFrame(replace(ann.shard.header, salt=bytes(32)))])
    await ann.until_offered(0)
    await ann.ship()
    assert ann.is_there()


async def test_a_dropped_shard_leaves_nothing_of_its_upload(ann: Ann) -> None:
    put = await ann.begin(4)
    assert await ann.drop() == 1
    with pytest.raises(ConflictError, match="it was dropped meanwhile"):
        await put.error()
    assert list(ann.incoming.parent.iterdir()) == []
    assert (await ann.offer()).chunks == 0
    assert await ann.drop() == 0
    await ann.begin_and_cut(2)
    assert await ann.drop() == 1
    await ann.ship()
    assert ann.is_there()
    assert await ann.drop() == 1
    assert not ann.stored.exists()


async def test_what_nobody_goes_on_with_is_removed_when_it_is_old(ann: Ann, tmp_path: Path) -> None:
    life_s = ann.cluster.settings.unfinished_shard_life_s
    await ann.begin_and_cut(4)
    for restart in (True, False):
        await ann.cluster.restart()
        assert (await ann.offer()).chunks == 4, "not old yet"
        then = time.time() - life_s - 60
        for path in (ann.incoming, ann.journal):
            os.utime(path, (then, then))
        if restart:
            await ann.cluster.restart()
        else:
            await Ann(ann.cluster, Shard.of(tmp_path / "other", 5000, 4096, seed=1)).ship()
        assert list(ann.incoming.parent.iterdir()) == []
        assert (await ann.offer()).chunks == 0
        await ann.begin_and_cut(4)
    os.utime(ann.incoming, (0, 0))
    os.utime(ann.journal, (0, 0))
    await ann.ship()
    assert [each.held_bytes for each in ann.cuts] == [sealed_bytes(ann.shard.header, 4)], (
        "it is what somebody goes on with"
    )
    assert ann.is_there()


async def test_a_full_disk_takes_nothing_and_keeps_nothing(ann: Ann, file_size_limit: Callable[[int], None]) -> None:
    put = await ann.begin(4)
    file_size_limit(5 * 4096)
    await put.send(ann.shard.frames(4, 5)[1:])
    with pytest.raises(OverloadedError, match="incoming: no room for"):
        await put.error()
    file_size_limit(resource.RLIM_INFINITY)
    assert list(ann.incoming.parent.iterdir()) == []
    await ann.ship()
    assert ann.is_there()


async def test_no_room_is_told_before_the_first_chunk(ann: Ann) -> None:
    await ann.cluster.stop()
    ann.cluster.settings = ann.cluster.settings.model_copy(update={"disk_reserve_bytes": 1 << 60})
    await ann.cluster.start()
    with pytest.raises(OverloadedError, match=r"incoming: \d+ bytes are needed, \d+ are free"):
        await ann.ship()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": ObjectKind.MODEL}, r"header\.kind: model given; allowed: shard"),
        ({"model_sha256": "../../x"}, r"header\.model_sha256: \.\./\.\./x given; allowed: 64 of 0 to 9 and a to f"),
        ({"model_sha256": "AB" * 32}, r"header\.model_sha256: ABAB\w+ given"),
        ({"elements": 0}, r"header\.elements: 0 given; allowed: 1 to 17179869184 bytes"),
        ({"elements": 1 << 62}, r"header\.elements: \d+ given"),
        ({"chunk_elements": 1}, r"header\.chunk_elements: 1 given; allowed: 1024 to 4194304 bytes"),
        ({"chunk_elements": 0}, r"header\.chunk_elements: 0 given"),
        ({"chunks": 8}, r"header\.chunks: 8 given; allowed: 9, for so many elements"),
        ({"manifest": b"\xff"}, r"header\.manifest: 1 bytes given; allowed: none"),
        ({"weight": float("nan")}, r"header\.weight: nan given"),
        ({"job_id": "x" * 5000}, r"header: \d+ bytes of text given; allowed: 4096"),
        ({"salt": b"x"}, "header: object_id has 16 bytes, salt 32"),
        ({"kind": ObjectKind.UPDATE, "chunks": 3, "elements": 0}, "shard: 3 mistakes"),
    ],
)
async def test_an_offer_of_no_shard_is_refused_and_says_why(ann: Ann, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        await ann.offer(**changes)
    put = RawPut(ann.cluster)
    await put.send([HeaderFrame(replace(ann.shard.header, **changes))])
    with pytest.raises(InvalidArgumentError, match=told):
        await put.error()
    assert list(ann.incoming.parent.iterdir()) == []


async def test_a_stream_without_a_header_is_refused(ann: Ann) -> None:
    put = RawPut(ann.cluster)
    await put.send(ann.shard.frames(0, 1)[1:])
    with pytest.raises(InvalidArgumentError, match="its header is missing"):
        await put.error()
