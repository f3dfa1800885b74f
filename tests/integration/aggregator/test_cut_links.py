"""A link that is cut costs at most one flow-control window, counted on the wire, in either direction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc import channel, server
from cortex_common.rpc.channel import open_channel
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS, Manifest, TensorKind
from cortex_common.transfer import push_update
from tests.integration.aggregator.harness import Cluster, arena_of, encoder, running_cluster
from tests.integration.aggregator.test_downloads import Holder
from tests.links import CutLink, Progress, over

MANIFEST = Manifest.of([("w", (20, 1024, 256), TensorKind.TRAINABLE)])
OBJECT = 4 * MANIFEST.elements
CHUNK = 4 * DEFAULT_CHUNK_ELEMENTS
CUTS = 3
# On its way beside the window: the message that was being put together, and what two sockets of the proxy hold.
BESIDE_WINDOW = CHUNK + 512 * 1024


@pytest.fixture
async def cluster(tls_of: Callable[..., TlsFiles], tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tls_of, tmp_path) as running:
        running.chunk_elements = DEFAULT_CHUNK_ELEMENTS
        yield running


@pytest.mark.parametrize(("direction", "window_bytes"), [("up", server.WINDOW_BYTES), ("down", channel.WINDOW_BYTES)])
async def test_a_cut_costs_at_most_a_window(cluster: Cluster, direction: str, window_bytes: int) -> None:
    first = await cluster.first_version(arena_of(0, MANIFEST), MANIFEST)
    host, port = cluster.address.rsplit(":", 1)
    link = CutLink(bytes_per_s=6e6)
    progress = Progress()
    async with over(link, lambda: (host, int(port))) as address:
        if direction == "down":
            moving = asyncio.create_task(Holder(cluster, manifest=MANIFEST).pull(first, address, 1, progress))
        else:
            moving = asyncio.create_task(upload(cluster, first, address, progress))
        for cut in range(1, CUTS + 1):
            await progress.reached(3 * cut)
            await link.cut()
        await moving
    # TLS, HTTP/2, handshakes and acknowledgements come to less than 2 % of it.
    assert OBJECT < link.passed_bytes < 1.02 * OBJECT + CUTS * (window_bytes + BESIDE_WINDOW)


async def upload(cluster: Cluster, base: str, address: str, progress: Progress) -> None:
    await cluster.open(1, base)
    header, arena = cluster.header(1, base, manifest=MANIFEST), arena_of(2, MANIFEST)
    async with open_channel(address, cluster.tls_of(Role.WORKER, "w0"), Role.AGGREGATOR, bulk=True) as channel:
        await push_update(channel, header, encoder(header, arena), cluster.encryption, progress)
