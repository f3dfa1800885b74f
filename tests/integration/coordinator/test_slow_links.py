"""Jobs over bad links: bulk transfers share them with heartbeats and orders, and must leave room."""

from __future__ import annotations

import numpy as np
import pytest

from cortex_common.job.status import JobPhase
from cortex_common.pb.v1 import coordinator_pb2 as pb
from tests.integration.coordinator.harness import LARGE, ScriptedWorker, Site, working
from tests.integration.coordinator.test_jobs import announce, job, submit, until
from tests.links import Link, over

MBIT = 125_000.0


@pytest.mark.parametrize(
    "link",
    [Link(10 * MBIT), Link(100 * MBIT, delay_s=0.1, loss=0.01)],
    ids=["10 Mbit/s", "200 ms round trip, 1 % loss"],
)
async def test_a_job_finishes_and_nobody_is_taken_for_lost(tls_of, tmp_path, link):
    cortex = Site(tls_of, tmp_path)
    try:
        await cortex.start("discovery")
        async with (
            over(link, lambda: ("127.0.0.1", cortex._ports["aggregator"])) as aggregator,
            over(link, lambda: ("127.0.0.1", cortex._ports["coordinator"])) as coordinator,
        ):
            cortex.advertise, cortex.entrance = aggregator, coordinator
            await cortex.start("aggregator")
            await cortex.start("coordinator")
            await announce(cortex, "w1", "w2")
            workers = [
                ScriptedWorker(cortex, name, value, manifest=LARGE) for name, value in (("w1", 1.0), ("w2", 3.0))
            ]
            async with working(*workers), cortex.jobs() as stub:
                job_id = await submit(stub, job(training={"rounds": 2}))
                status = await until(stub, job_id, JobPhase.COMPLETED, JobPhase.FAILED)
                assert status.status is JobPhase.COMPLETED, status.error
                assert [report.accepted for report in status.history] == [2, 2]
                events = [e.event.name async for e in stub.WatchEvents(pb.WatchEventsRequest(job_id=job_id))]
            assert not {"seat_given_on", "seat_dropped", "round_retried"} & set(events)
            # The first version, two updates in each of two rounds, and each version to both workers: not much more.
            payload = 4 * LARGE.elements * (1 + 4 + 4)
            assert payload < link.passed_bytes < 1.1 * payload
            assert np.isfinite(status.goodput)
    finally:
        await cortex.close()
