"""What rests under a data key that was replaced since can still be read by a worker inside a program."""

from __future__ import annotations

from cortex_common.ids import JobId
from cortex_common.pb.v1 import common_pb2
from cortex_common.security.encryption import EncryptionManager
from tests.integration.manager.embedded import embedded
from tests.integration.worker.harness import digits_job, network_of
from tests.waiting import eventually


async def test_a_version_made_before_the_data_key_was_replaced_can_be_read(tls_of, tmp_path) -> None:
    job = digits_job()
    async with network_of(tls_of, tmp_path, "websocket") as network:
        access = await network.access("m1", network.coordinator_address)
        async with embedded(network, "m1", job, access) as worker:
            base = await network.first_version(job, "m1")
            old = network.key
            for epoch, older in ((2, [old]), (3, [])):
                network.key = EncryptionManager.new_data_key(epoch)
                keys = [common_pb2.DataKey(key_id=each.key_id, epoch=each.epoch, key=each.key) for each in older]
                hold = network.assignment(job, 1, base, hold={}, older_keys=keys)
                await network.coordinator.assign("m1", hold)
                given = worker._assigned
                await eventually(lambda given=given: given[JobId(network.job_id)].data_key.key_id == network.key.key_id)
                model, manifest, arena = await worker.model(JobId(network.job_id), base, 0)
                assert manifest.elements == arena.values.size == model.parameter_count == 2_410
