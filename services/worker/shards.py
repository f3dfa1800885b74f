"""Opening what a job with sealed data trains on: its manifest is proven, shards are fetched and opened in memory."""

from __future__ import annotations

from collections.abc import Callable

from cortex_common.clock import Clock
from cortex_common.data.sealed import Described, described
from cortex_common.errors import CorruptError
from cortex_common.network.work import Assignment, SealedPart
from cortex_common.security.sealing import SealingKey
from cortex_common.security.shards import ShardIntake, check_signature
from cortex_common.transfer.pacing import Pace
from cortex_common.transfer.push import FindChannel
from cortex_common.transfer.shards import pull_shard
from services.worker import metrics
from services.worker.failures import WorkFailedError
from services.worker.opened_shards import OpenedShards


async def open_shards(
    assignment: Assignment,
    part: SealedPart,
    sealing: SealingKey,
    channel: FindChannel,
    most_bytes: int,
    tell: Callable[[float], None],
    *,
    clock: Clock,
    pace: Pace,
) -> OpenedShards:
    """Fetch and open the shards of an assignment. What was opened is erased again if this fails or is cancelled.

    Args:
        assignment: Whose.
        part: Its data.
        sealing: Opens the shards' keys, which are kept by nobody here.
        channel: Finds the aggregator.
        most_bytes: That opened data may take.
        tell: Told the share that is done.
        clock: For waiting between attempts.
        pace: Of the way down.

    Raises:
        WorkFailedError: they are too large, or this system has no such memory.
        CorruptError: the manifest is not the one that the job names, or a shard is not the manifest's.
        ForbiddenError: the manifest is not signed by its owner.
        NotFoundError: the aggregator does not have a shard.
        UnavailableError: a key was wrapped for somebody else.
    """
    told = _proven(assignment, part)
    manifest = told.manifest
    sizes = [manifest.shard_bytes(index) for index in part.shards]
    if sum(sizes) > most_bytes:
        reason = f"{sum(sizes)} bytes of shards; allowed: {most_bytes} (max_data_bytes of the worker)"
        raise WorkFailedError(reason, is_permanent=False)
    opened = OpenedShards(told.digest, told.envelope.payload.decode(), part.shards, sum(sizes))
    try:
        start = 0
        for place, (index, wrapped, size) in enumerate(zip(part.shards, part.keys, sizes, strict=True)):
            key = sealing.unwrap_once(assignment.job_id, wrapped)
            target = opened.view[start : start + size]
            received = await pull_shard(
                channel,
                assignment.job_id,
                lambda index=index, key=key, target=target: ShardIntake(manifest, index, key, target),  # type: ignore[misc]
                lambda done, total, place=place: tell((place + done / total) / len(sizes)),  # type: ignore[misc]
                clock=clock,
                pace=pace,
            )
            metrics.BYTES_DOWN.inc(received)
            start += size
    except BaseException:
        opened.erase()
        raise
    return opened


def _proven(assignment: Assignment, part: SealedPart) -> Described:
    """The manifest, if it is the one that the job names and its owner has signed it."""
    told = described(part.manifest)
    if told.digest != assignment.spec.data.sealed_digest:
        raise CorruptError(f"manifest of data set {told.manifest.name}: not the one that the job names in data.train")
    check_signature(told)
    count = len(told.manifest.shards)
    if not part.shards or max(part.shards) >= count or len(set(part.shards)) < len(part.shards):
        raise CorruptError(
            f"data set {told.manifest.name}: shards {part.shards} given; allowed: some of 0 to {count - 1}"
        )
    return told
