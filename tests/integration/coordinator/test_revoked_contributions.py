"""A worker is shut out when its update is accepted and not yet committed: the update, and the worker's key, are out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors

from cortex_common.identity import Role
from cortex_common.job.status import JobPhase
from cortex_common.job.wire import status_from_proto
from cortex_common.pb.v1 import coordinator_pb2 as pb
from cortex_common.pb.v1 import identity_pb2, identity_pb2_grpc
from cortex_common.rpc.channel import open_channel
from tests.integration.coordinator.harness import ScriptedWorker, Site, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until
from tests.integration.coordinator.test_keys import epochs_of, model_of

WITHIN_S = 10.0


async def revoke(cortex: Site, name: str) -> None:
    async with open_channel(cortex.discovery, cortex.tls_of(Role.OPERATOR, "ann"), Role.DISCOVERY) as channel:
        request = identity_pb2.RevokeNodeRequest(name=name, reason="lost")
        await identity_pb2_grpc.IdentityServiceStub(channel).RevokeNode(request)


async def until_accepted(stub: Any, job_id: str, worker: str, number: int) -> None:
    """Return once the round has this worker's update."""
    async for answer in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
        status = status_from_proto(answer.job)
        if status.round == number and {each.worker: each.activity for each in status.workers}.get(worker) == "done":
            return


async def until_event(stub: Any, job_id: str, *names: str) -> pb.JobEvent:
    """The first event of these names."""
    async for answer in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id, follow=True)):
        if answer.event.name in names:
            return answer.event
    raise AssertionError(f"the job ended without {names}")


async def test_what_a_revoked_worker_sent_is_left_out_and_the_next_key_is_not_for_it(cortex: Site) -> None:
    lost, stays = ScriptedWorker(cortex, "w1", 1.0), ScriptedWorker(cortex, "w2", 3.0)
    comes = ScriptedWorker(cortex, "w3", 5.0)
    await announce(cortex, "w1", "w2", "w3")
    async with working(lost, stays), cortex.jobs() as stub:
        stays.hold_at(2)
        job_id = await submit(stub, job(training={"rounds": 4}))
        await until_accepted(stub, job_id, "w1", 2)
        async with asyncio.timeout(WITHIN_S):
            await revoke(cortex, "w1")
            excluded = await until_event(stub, job_id, "contribution_excluded")
        assert excluded.round == 2
        assert "w1" in excluded.message
        async with working(comes):
            stays.let_go()
            status = await until(stub, job_id, JobPhase.COMPLETED)
        weights = load_safetensors(await model_of(stub, job_id))
    assert [report.accepted for report in status.history] == [2] * 4
    first_value = 1.0 if lost.done[0].split("/")[2] == "0" else 3.0
    # Round 1 adds the mean of 1 and 3; rounds 2 to 4 that of 3 and 5: nothing of what w1 sent in round 2.
    np.testing.assert_array_equal(weights["w"], np.full((4, 3), first_value + 2.0 + 3 * 4.0, np.float32))
    first, second = await epochs_of(cortex, job_id)
    assert second.reason == "worker w1 left"
    assert second.from_round == 2
    assert set(lost.keys) == {first.key_id}
    assert second.key_id in comes.keys
