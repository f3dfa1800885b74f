"""Fetching a sealed shard: each chunk is opened as it comes, into memory; resumed after a cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from functools import partial

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, RoundNumber
from cortex_common.security.shards import ShardIntake
from cortex_common.transfer.frames import ChunkFrame, HeaderFrame, TrailerFrame
from cortex_common.transfer.pacing import UNPACED, Pace
from cortex_common.transfer.pull import pull_frames, pull_request
from cortex_common.transfer.push import FindChannel, Progress
from cortex_common.transfer.retrying import on_thread, until_through


async def pull_shard(
    channel: FindChannel,
    job_id: JobId,
    begin: Callable[[], ShardIntake],
    on_progress: Progress | None = None,
    *,
    clock: Clock | None = None,
    pace: Pace = UNPACED,
) -> int:
    """Download one shard, and open it; the sealed bytes that came.

    Args:
        channel: Finds the aggregator, for each attempt.
        job_id: For whom.
        begin: Gives what opens the shard; asked again when chunks came that are not the shard's.
        on_progress: Told after each chunk.
        clock: For waiting between attempts.
        pace: Of the way down.

    Raises:
        NotFoundError: the aggregator does not have it.
        CorruptError: what it has is not the shard of the manifest, still so after several attempts.
    """
    pull = _Pull(channel, job_id, begin, on_progress, pace)
    return await until_through(pull.attempt, clock)


class _Pull:
    """One shard on its way; keeps the chunks it has between attempts."""

    def __init__(
        self,
        channel: FindChannel,
        job_id: JobId,
        begin: Callable[[], ShardIntake],
        on_progress: Progress | None,
        pace: Pace,
    ) -> None:
        self._channel = channel
        self._job_id = job_id
        self._begin = begin
        self._progress = on_progress
        self._pace = pace
        self._intake: ShardIntake | None = None
        self._bytes = 0

    async def attempt(self) -> int:
        intake = self._intake = self._intake or self._begin()
        try:
            await self._receive(intake)
        except CorruptError:
            self._intake = None
            raise
        return self._bytes

    async def _receive(self, intake: ShardIntake) -> None:
        header = intake.header
        request = pull_request(self._job_id, header.model_sha256, intake.next, RoundNumber(0))
        what = f"fetching shard {header.round} of data set {header.job_id}"
        async with aclosing(pull_frames(self._channel(), request, what, self._pace)) as frames:
            first = await anext(frames)
            if not isinstance(first, HeaderFrame) or first.first_chunk != intake.next:
                raise CorruptError(f"{what}: it must begin with its header")
            while isinstance(frame := await anext(frames), ChunkFrame):
                await on_thread(partial(intake.take, frame.index, frame.sealed))
                self._bytes += len(frame.sealed)
                if self._progress:
                    self._progress(intake.next, header.chunks)
            if not isinstance(frame, TrailerFrame):
                raise CorruptError(f"{what}: it must end with its trailer")
        await on_thread(intake.finish)
