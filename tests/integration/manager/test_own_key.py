"""`security.encryption_key` in the file: a whole network in this process, and a CortexManager with its own key."""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from pathlib import Path

import pytest

from cortex.integration.manager import CortexManager
from cortex_common.errors import UnavailableError
from cortex_common.identity import Role
from cortex_common.ids import JobId, RoundNumber, Sha256Hex
from cortex_common.job.parse import parse_job
from cortex_common.job.status import JobPhase
from cortex_common.network.work import Assignment
from cortex_common.rpc.channel import open_channel
from cortex_common.security.encryption import EncryptionManager
from cortex_common.security.sealing import SealingKey
from cortex_common.tensors import Arena, Manifest
from cortex_common.transfer import pull_model
from tests.integration.coordinator.harness import site
from tests.integration.manager.embedded import admitted, loader_for
from tests.integration.worker.gateways import Nodes
from tests.unit.manager.test_manager_settings import CONTRACT
from tests.waiting import eventually

JOB = parse_job(
    {
        "model": {"input_dim": 64, "hidden_dims": [16], "output_dim": 10},
        "data": {"train": "own", "partition": {"scheme": "local"}},
        "training": {"rounds": 2},
        "placement": {"workers": 1},
    }
)


@pytest.fixture(autouse=True)
def _no_network_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


async def test_the_key_in_the_file_opens_what_the_network_gives_this_node_and_no_other_does(tls_of, tmp_path) -> None:
    own = os.urandom(32)
    async with site(tls_of, tmp_path) as cortex:
        nodes = Nodes(tls_of, tmp_path, cortex.discovery)
        async with nodes.gateway(cortex.coordinator) as url, cortex.jobs() as jobs:
            (tmp_path / "config.yaml").write_text(CONTRACT)
            given = {
                "NETWORK__WEBSOCKET_URL": url,
                "NETWORK__TOKEN": (await nodes.token("local_node_1", region="local")).encode(),
                "TRAINING__DATASET": "own",
                "TRAINING__INPUT_DIM": "64",
                "TRAINING__HIDDEN_DIMS": "[16]",
                "SECURITY__ENCRYPTION_KEY": b64encode(own).decode(),
                "MONITORING__METRICS_PORT": "0",
            }
            manager = CortexManager(tmp_path / "config.yaml", {f"CORTEX_{key}": value for key, value in given.items()})
            await manager.initialize()
            training = asyncio.create_task(manager.start_training(loader_for(JOB)))
            job_id = await admitted(jobs, JOB, training)
            await eventually(lambda: training.done() or bool(manager._worker and manager._worker._assigned))
            assignment: Assignment = manager._worker._assigned[JobId(job_id)]
            status = await training
            assert (status.status, [report.accepted for report in status.history]) == (JobPhase.COMPLETED, [1, 1])
            assert not (tmp_path / ".cortex-node" / "local_node_1" / "sealing.key").exists()

            data_key = SealingKey.of("cortex", own).unwrap(JobId(job_id), assignment.data_key)
            with pytest.raises(UnavailableError, match="does not open with the sealing key of this process"):
                SealingKey.of("cortex", os.urandom(32)).unwrap(JobId(job_id), assignment.data_key)
            # That data key opens what this node and the aggregator have sealed.
            held: list[Arena] = []

            def allocate(manifest: Manifest) -> Arena:
                held[:] = [Arena.zeros(manifest)]
                return held[0]

            assert status.model is not None
            where, member = assignment.aggregator_address, tls_of(Role.WORKER, "local_node_1")
            async with open_channel(where, member, Role.AGGREGATOR, bulk=True) as channel:
                wanted, number = Sha256Hex(status.model.sha256), RoundNumber(status.model.round)
                keys = EncryptionManager(data_key)
                await pull_model(lambda: channel, JobId(job_id), wanted, "", keys, allocate, number)
            assert held[0].values.size == status.model.parameters
