"""A program that ends in the middle of an upload goes on with it when it is started again, and trains nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cortex_common.job.parse import parse_job
from cortex_common.tensors import DEFAULT_CHUNK_ELEMENTS
from services.worker.trainer.loader import LoaderData
from tests.integration.manager.embedded import embedded, loader_for
from tests.integration.worker.conftest import StepCount
from tests.integration.worker.harness import Network, network_of
from tests.links import CountedLink, over
from tests.recomputed import digests
from tests.waiting import eventually

JOB = parse_job(
    {
        "model": {"input_dim": 64, "hidden_dims": [1024, 1024], "output_dim": 10},
        "data": {"train": "own"},
        "training": {"learning_rate": 0.01, "rounds": 1, "seed": 3},
    }
)
CHUNK_BYTES = 4 * DEFAULT_CHUNK_ELEMENTS
STEPS = 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The last bits of what is trained depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
async def network(tls_of: Any, tmp_path: Path) -> AsyncIterator[Network]:
    async with network_of(tls_of, tmp_path, "websocket") as made:
        yield made


async def _broken_off(network: Network, access: dict[str, Any], link: CountedLink, target: tuple[str, int]) -> Any:
    """Train round 1, and end when one chunk of the update has arrived; the assignment."""
    async with AsyncExitStack() as program, over(link, lambda: target) as address:
        there = {**access, "gateway_url": f"ws://{address}"}
        await program.enter_async_context(embedded(network, "m1", JOB, there))
        base = await network.first_version(JOB, "m1")
        await network.open_round(1, ["m1"], base)
        link.hold_bytes = link.up_bytes + CHUNK_BYTES + 200_000
        train = network.assignment(JOB, 1, base, train={})
        await network.coordinator.assign("m1", train)
        await eventually(lambda: link.up_bytes > (link.hold_bytes or 0) and _here(network) > CHUNK_BYTES // 2, 60)
    network.base = base
    return train


def _here(network: Network) -> int:
    """Bytes that the aggregator has of the update of round 1: whole chunks, and the header."""
    return sum(path.stat().st_size for path in (network.folder / "aggregator").rglob("1-0/seat-0.update"))


def _kept(network: Network) -> int:
    """Bytes of the update in the program's state directory: all chunks, and the header."""
    return sum(path.stat().st_size for path in (network.folder / "m1" / "updates").rglob("sealed.update"))


@pytest.mark.parametrize("is_tried_again", [False, True])
async def test_an_upload_goes_on_where_it_was_broken_off(network: Network, is_tried_again: bool) -> None:
    access = await network.access("m1", network.coordinator_address)
    host, port = access["gateway_url"].removeprefix("ws://").split(":")
    train = await _broken_off(network, access, CountedLink(bytes_per_s=50e6), (host, int(port)))
    here_bytes, whole_bytes = _here(network), _kept(network)
    assert CHUNK_BYTES // 2 < here_bytes < whole_bytes
    if is_tried_again:
        await network.open_round(1, ["m1"], network.base, attempt=1)
        train = network.assignment(JOB, 1, network.base, train={}, attempt=1)
        await network.coordinator.assign("m1", train)
    steps_done, link = StepCount(), CountedLink(bytes_per_s=50e6)
    async with over(link, lambda: (host, int(port))) as address:
        there = {**access, "gateway_url": f"ws://{address}"}
        async with embedded(network, "m1", JOB, there):
            report = await network.coordinator.report_on(train, "trained")
    assert (steps_done(), report.trained.steps) == (0, STEPS)
    left_bytes = whole_bytes - (0 if is_tried_again else here_bytes)
    assert left_bytes - 10_000 < report.trained.bytes_up < link.up_bytes < left_bytes + 100_000
    version = await network.seal(1, report, attempt=int(is_tried_again))
    examples = LoaderData(loader_for(JOB), JOB.model).training_part(0, 1, torch.device("cpu"))
    assert [version] == digests(JOB, [examples])
    assert not list((network.folder / "m1" / "updates").iterdir())


async def test_a_damaged_update_is_trained_again(network: Network) -> None:
    access = await network.access("m1", network.coordinator_address)
    host, port = access["gateway_url"].removeprefix("ws://").split(":")
    train = await _broken_off(network, access, CountedLink(bytes_per_s=50e6), (host, int(port)))
    (path,) = (network.folder / "m1" / "updates").rglob("*.update")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    steps_done = StepCount()
    async with embedded(network, "m1", JOB, access):
        report = await network.coordinator.report_on(train, "trained")
    assert steps_done() == STEPS
    assert report.trained.bytes_up > len(data) - 10_000
