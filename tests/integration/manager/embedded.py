"""Workers inside a program, on data of their own, through a gateway in front of a scripted coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.spec import JobSpec
from cortex_common.job.wire import spec_to_proto
from cortex_common.security.sealing import SealingKey
from services.worker.embedded import EmbeddedWorker
from tests.integration.coordinator.test_jobs import submit
from tests.integration.worker.harness import Network


def loader_for(spec: JobSpec, examples: int = 320) -> DataLoader[Any]:
    """Data that fit the job, the same every time: the label shows in the input."""
    labels = torch.arange(examples) % spec.model.output_dim
    noise = torch.randn(examples, spec.model.input_dim, generator=torch.Generator().manual_seed(1))
    inputs = torch.nn.functional.one_hot(labels, spec.model.input_dim).float() + 0.1 * noise
    return DataLoader(TensorDataset(inputs, labels), batch_size=32)


async def admitted(jobs: Any, job: JobSpec, training: asyncio.Task[Any]) -> str:
    """The id of the job, submitted as soon as the coordinator has heard of the data of a program that trains."""
    while not training.done():
        try:
            return await submit(jobs, spec_to_proto(job))
        except InvalidArgumentError as error:
            assert {each.path for each in error.violations} == {"data.train"}  # noqa: PT017 - the wait goes on
            await asyncio.sleep(0.05)
    raise AssertionError(await training)


@asynccontextmanager
async def embedded(
    network: Network, name: str, spec: JobSpec, access: Mapping[str, Any], sealing: SealingKey | None = None
) -> AsyncIterator[EmbeddedWorker]:
    """One that is connected, with the same state directory whenever it has the same name."""
    facts = {"name": name, "state_dir": network.folder / name, "cache_dir": network.folder / "cache", **access}
    key = sealing or SealingKey("cortex")
    worker = EmbeddedWorker(facts, loader_for(spec), spec, key, serves_metrics=False)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()
