"""The examples in the docstrings of parts that need a running network, run in one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cortex import BatchProcessor, JobCoordinator, ModelDeploymentManager, TenzroBridge, WeightAggregator
from cortex_common.identity import Role
from cortex_common.ids import Sha256Hex
from cortex_common.job.parse import parse_job
from cortex_common.network.grpc_transport import Peers
from cortex_common.security.sealing import SealingKey
from cortex_common.tensors import Arena, Manifest, TensorKind, model_sha256
from services.aggregator.wire import terms_from_proto
from services.coordinator.domain.reach import EVERYTHING, Caller
from tests.doctests import run_examples
from tests.integration.aggregator.harness import MANIFEST, arena_of, encoder, running_cluster
from tests.integration.coordinator.harness import ScriptedWorker, Site, site, working
from tests.integration.coordinator.test_jobs import announce
from tests.unit.dataplane.test_fold import CRYPT, Memory

LAYOUT = Manifest.of([("w", (30, 40), TensorKind.TRAINABLE)])
JOB = {
    "model": {"input_dim": 64, "output_dim": 10},
    "data": {"train": "digits"},
    "training": {"rounds": 2},
    "placement": {"workers": 2},
}


@asynccontextmanager
async def working_site(tls_of: Any, root: Path) -> AsyncIterator[Site]:
    async with site(tls_of, root) as made:
        await announce(made, "w1", "w2")
        async with working(ScriptedWorker(made, "w1", 1.0), ScriptedWorker(made, "w2", 3.0)):
            yield made


async def test_a_job_coordinator_runs_a_job(tls_of, tmp_path):
    async with working_site(tls_of, tmp_path) as made:
        assert await run_examples(JobCoordinator, {"coordinator": made.running.coordinator})


async def test_a_deployment_manager_delivers_what_a_job_has_made(tls_of, tmp_path):
    async with working_site(tls_of, tmp_path) as made:
        coordinator = made.running.coordinator
        job_id = await coordinator.submit(parse_job(JOB), Caller("ann"), None)
        async for _ in coordinator.watch(job_id, EVERYTHING):
            pass
        job = await coordinator.job(job_id, EVERYTHING)
        assert await run_examples(ModelDeploymentManager, {"deployment": made.running.deployment, "job": job})


async def test_a_bridge_connects_a_node(tls_of, tmp_path):
    async with site(tls_of, tmp_path) as made:
        peers, sealing = Peers(made.coordinator, made.discovery), SealingKey("cortex")
        given = {"peers": peers, "tls": tls_of(Role.WORKER, "gpu-7"), "sealing": sealing}
        assert await run_examples(TenzroBridge, given)


async def test_a_weight_aggregator_makes_a_version_of_an_update(tls_of, tmp_path):
    async with running_cluster(tls_of, tmp_path) as cluster:
        header, spec = cluster.header(0), cluster.spec(0)
        given = {
            "aggregator": cluster.running.aggregator,
            "terms": terms_from_proto(spec),
            "data_key": cluster.key,
            "channel": cluster.channel(Role.WORKER, header.sender),
            "header": header,
            "encode": encoder(header, arena_of(1, MANIFEST)),
            "encryption": cluster.encryption,
        }
        assert await run_examples(WeightAggregator, given)


async def test_a_batch_processor_folds_updates():
    base, *updates = (arena_of(seed, LAYOUT) for seed in range(3))

    def digest_of(values: Any) -> Sha256Hex:
        return model_sha256(LAYOUT, Arena(values.astype("float32"), base.counters))

    given = {
        "manifest": LAYOUT,
        "encryption": CRYPT,
        "base": Memory(LAYOUT, base),
        "update_1": Memory(LAYOUT, updates[0]),
        "update_2": Memory(LAYOUT, updates[1], seat=1),
        "target": Memory(LAYOUT),
        "base_numbers": base.values.astype("float64"),
        "numbers_1": updates[0].values.astype("float64"),
        "numbers_2": updates[1].values.astype("float64"),
        "model_sha256_of": digest_of,
    }
    assert await run_examples(BatchProcessor, given)
