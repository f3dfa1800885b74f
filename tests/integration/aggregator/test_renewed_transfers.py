"""Transfers that last longer than the certificate they began with go on where they were, with the next one."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.renewing import RenewingChannel
from cortex_common.security.authority import Authority
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS, Manifest, TensorKind
from cortex_common.transfer import pull_model, push_update
from tests.integration.aggregator.harness import Cluster, arena_of, encoder, running_cluster
from tests.links import Link, over

MANIFEST = Manifest.of([("w", (6, 1024, 256), TensorKind.TRAINABLE)])
OBJECT = 4 * MANIFEST.elements
LIFE = dt.timedelta(seconds=2)
WORKER = Identity("cortex", Role.WORKER, NodeName("w0"))


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_transfer_outlives_its_certificate(
    authority: Authority, tls_of: Callable[..., TlsFiles], tmp_path: Path, direction: str
) -> None:
    async with running_cluster(tls_of, tmp_path / "state") as cluster:
        cluster.chunk_elements = DEFAULT_CHUNK_ELEMENTS
        base = await cluster.first_version(arena_of(0, MANIFEST), MANIFEST)
        await cluster.open(1, base)
        host, port = cluster.address.rsplit(":", 1)
        link = Link(bytes_per_s=OBJECT / (1.5 * LIFE.total_seconds()))
        tls = authority.issue(WORKER, [], tmp_path / "w0", life=LIFE)
        async with (
            over(link, lambda: (host, int(port))) as address,
            open_channel(address, tls, Role.AGGREGATOR, bulk=True) as channel,
        ):
            assert isinstance(channel, RenewingChannel)
            moving = asyncio.create_task(transfer(cluster, base, channel, direction))
            await asyncio.sleep(LIFE.total_seconds() / 2)
            authority.issue(WORKER, [], tmp_path / "w0")
            channel.refresh()
            await moving
        assert OBJECT < link.passed_bytes < 2 * OBJECT


async def transfer(cluster: Cluster, base: str, channel: RenewingChannel, direction: str) -> None:
    if direction == "up":
        header, arena = cluster.header(1, base, manifest=MANIFEST), arena_of(2, MANIFEST)
        await push_update(channel, header, encoder(header, arena), cluster.encryption)
    else:
        arena = arena_of(3, MANIFEST)
        await pull_model(lambda: channel, "job-1", base, "", cluster.encryption, lambda _: arena)
        assert (arena.values == arena_of(0, MANIFEST).values).all()
