"""One unreadable file costs what it held, and never the start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cortex_common.errors import NotFoundError, PreconditionError
from cortex_common.pb.v1 import aggregator_pb2
from cortex_common.rpc.errors import calling
from cortex_common.storage.records import record
from tests.integration.aggregator.harness import JOB, Cluster, arena_of

DAMAGED_LOG = record(b'{"phase":"open"}')


def versions(cluster: Cluster) -> Path:
    return cluster.settings.state_dir / "versions" / JOB


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"header":{}}', b""])
async def test_an_unreadable_version_is_set_aside(cluster: Cluster, content: bytes) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    receipt = (await cluster.push(cluster.header(1, base), arena_of(2))).receipt
    sealed = await cluster.seal(1, [receipt])
    await cluster.stop()
    (versions(cluster) / "1.json").write_bytes(content)
    await cluster.start()
    assert (versions(cluster) / "1.json.damaged").read_bytes() == content
    assert list(versions(cluster).glob("1-0-*.blob.damaged"))
    assert (await cluster.pull(base)).arena is not None
    with pytest.raises(NotFoundError, match="versions of these rounds are: 0"):
        await cluster.pull(sealed.version.sha256)
    # The spool is still here: the same list gives the same version again.
    assert (await cluster.seal(1, [receipt])).version.sha256 == sealed.version.sha256
    await cluster.restart()
    assert list(versions(cluster).glob("*.damaged"))
    request = aggregator_pb2.PruneJobRequest(job_id=JOB, fence=1, ended=True)
    await cluster.rounds.PruneJob(request)
    assert not versions(cluster).exists()


async def test_facts_under_another_rounds_name_are_set_aside(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.stop()
    facts = (versions(cluster) / "0.json").read_bytes()
    (versions(cluster) / "7.json").write_bytes(facts)
    await cluster.start()
    assert (versions(cluster) / "7.json.damaged").exists()
    assert (await cluster.pull(base, number=0)).arena is not None


async def test_an_unreadable_round_is_set_aside_and_can_be_made_again(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    receipt = (await cluster.push(cluster.header(1, base), arena_of(2))).receipt
    await cluster.stop()
    (cluster.spool(1) / "round.log").write_bytes(DAMAGED_LOG)
    await cluster.start()
    aside = cluster.spool(1).with_name("1-0.damaged")
    assert (aside / "seat-0.update").exists()
    # Its frozen list can no longer be folded here, and the coordinator is told so, not to wait.
    with pytest.raises(PreconditionError, match="no update of seat 0"), calling("aggregator"):
        await cluster.seal(1, [receipt])
    await cluster.open(1, base)
    again = await cluster.push(cluster.header(1, base), arena_of(2))
    assert again.receipt.newly_accepted
    await cluster.restart()
    assert aside.exists()
    assert (await cluster.seal(1, [again.receipt])).version.round == 1


async def test_an_unreadable_seat_is_filled_anew(cluster: Cluster) -> None:
    base = await cluster.first_version(arena_of(1))
    await cluster.open(1, base)
    await cluster.push(cluster.header(1, base), arena_of(2))
    await cluster.stop()
    update = cluster.spool(1) / "seat-0.update"
    update.write_bytes(record(b'{"kind":"update"}') + os.urandom(100))
    await cluster.start()
    await cluster.open(1, base)
    assert (await cluster.push(cluster.header(1, base), arena_of(2))).receipt.newly_accepted
