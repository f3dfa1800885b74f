"""A WebSocket that is cut costs at most a window of what was on its way, counted on the wire, in either direction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio

from cortex_common.ids import RoundNumber
from cortex_common.network.websocket_weights import WeightsChannel
from cortex_common.tensors import Arena, Manifest, TensorKind, model_sha256
from cortex_common.transfer import pull_model, push_update
from services.gateway.websocket.transfers import WINDOW
from tests.integration.aggregator.harness import JOB, Cluster, arena_of, encoder, running_cluster
from tests.integration.websocket.conftest import Gate, TlsOf
from tests.links import CutLink, Progress, over

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNK_ELEMENTS = 32 * 1024
CHUNK = 4 * CHUNK_ELEMENTS
CHUNKS = 48
MANIFEST = Manifest.of([("w", (CHUNKS, CHUNK_ELEMENTS), TensorKind.TRAINABLE)])
OBJECT = 4 * MANIFEST.elements
CUTS = (12, 24, 36)
"""Begun anew at each cut, the object would travel two and a half times."""
# What two sockets of the proxy hold, and the frame that was being put together.
ON_ITS_WAY = CHUNK + 512 * 1024
# Up, what the gateway has not passed on yet may go with the connection; down, nothing that has arrived is lost.
COST = {"up": WINDOW * CHUNK + ON_ITS_WAY, "down": ON_ITS_WAY}


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(gate: Gate, tls_of: TlsOf, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tls_of, tmp_path) as running:
        running.chunk_elements = CHUNK_ELEMENTS
        await gate.introduce("w0", running.address)
        yield running


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_cut_costs_at_most_a_window(gate: Gate, cluster: Cluster, direction: str) -> None:
    first = await cluster.first_version(arena_of(0, MANIFEST), MANIFEST)
    host, port = gate.url.removeprefix("ws://").rsplit(":", 1)
    link, progress = CutLink(bytes_per_s=8e6), Progress()
    async with over(link, lambda: (host, int(port))) as address:
        weights = WeightsChannel(await gate.access("w0", url=f"ws://{address}"))
        transfer = download if direction == "down" else upload
        moving = asyncio.create_task(transfer(cluster, first, weights.as_channel(), progress))
        for chunks in CUTS:
            await progress.reached(chunks)
            await link.cut()
        await moving
        await weights.close()
    # The handshakes, messages and acknowledgements come to less than 2 % of it.
    assert OBJECT < link.passed_bytes < 1.02 * OBJECT + len(CUTS) * COST[direction] < 2 * OBJECT


async def download(cluster: Cluster, sha256: str, channel: grpc.aio.Channel, progress: Progress) -> None:
    arena = Arena.zeros(MANIFEST)
    await pull_model(lambda: channel, JOB, sha256, "", cluster.encryption, lambda _: arena, RoundNumber(1), progress)
    assert model_sha256(MANIFEST, arena) == sha256


async def upload(cluster: Cluster, base: str, channel: grpc.aio.Channel, progress: Progress) -> None:
    await cluster.open(1, base)
    header, arena = cluster.header(1, base, manifest=MANIFEST), arena_of(2, MANIFEST)
    pushed = await push_update(lambda: channel, header, encoder(header, arena), cluster.encryption, progress)
    assert pushed.receipt.newly_accepted
    (seat,) = (await cluster.view(1)).seats
    assert seat.receipt.content_sha256 == pushed.receipt.content_sha256, "it counts, once"
