"""A newer stream for a seat that waits for the older one to let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cortex_common.clock import SystemClock
from cortex_common.errors import ConflictError, PreconditionError
from cortex_common.identity import Identity, Role
from cortex_common.ids import JobId, NodeName, RoundNumber, SeatIndex
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.tensors import Manifest, TensorKind
from cortex_common.transfer import HeaderFrame, Receipt, frame_to_bytes
from cortex_common.validation import ValidationManager
from services.aggregator.domain import Phase, RoundKey, RoundTerms
from services.aggregator.receiving import Receiver, Resume
from services.aggregator.rounds import LiveRound
from services.aggregator.settings import AggregatorSettings
from services.aggregator.store import DirectoryRoundStore, StoredRound
from services.aggregator.uploads import Upload

JOB = JobId("job-1")
KEY = RoundKey(JOB, RoundNumber(1), 0)
MANIFEST = Manifest.of([("w", (100,), TensorKind.TRAINABLE)])
WORKER = Identity("cortex", Role.WORKER, NodeName("w0"))
CHUNK = 1024


async def silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


class Waiting:
    """A round whose seat is being filled by an older stream, and a newer one that waits for it."""

    def __init__(self, root: Path) -> None:
        key = EncryptionManager.new_data_key()
        terms = RoundTerms(KEY, 1, "0" * 64, {SeatIndex(0): WORKER.name}, "none", "{}", "fedavg", "{}", CHUNK)
        self.live = LiveRound(terms, data_key=key, base=MANIFEST)
        store = DirectoryRoundStore(root)
        store.save(StoredRound(terms, Phase.OPEN))
        settings = AggregatorSettings(
            ca=root, certificate=root, key=root, name="a", state_dir=root, disk_reserve_bytes=0
        )
        self.rounds = {KEY: self.live}
        encryption = EncryptionManager(key)
        self.receiver = Receiver(settings, self.rounds, store, encryption, ValidationManager(), SystemClock())
        self.older = self.live.seat(SeatIndex(0)).upload = Upload(silence(), 30.0)
        self.header = ObjectHeader(
            ObjectKind.UPDATE, "cortex", JOB, KEY.round, 0, 1, WORKER.name, SeatIndex(0), key.key_id, "none", "{}",
            CHUNK, 100, 0, 1, MANIFEST.sha256, "0" * 64, weight=1.0,
        ).fresh()  # fmt: skip
        self.task = asyncio.create_task(self._push())

    async def _push(self) -> Resume | Receipt:
        async def messages() -> AsyncIterator[bytes]:
            yield frame_to_bytes(HeaderFrame(self.header))
            await asyncio.Event().wait()

        return await anext(self.receiver.push(WORKER, messages()))

    async def until_waiting(self) -> None:
        async with asyncio.timeout(5):
            while True:
                await asyncio.sleep(0)
                try:
                    self.older.check()
                except ConflictError:
                    return

    def let_go(self) -> None:
        for state in self.live.seats.values():
            state.upload = None
        self.older.ended.set()


async def test_a_stream_that_waited_goes_on_while_the_round_is_open(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    await waiting.until_waiting()
    waiting.let_go()
    assert await waiting.task == Resume(0)


async def test_an_upload_that_is_interrupted_just_as_its_time_runs_out_ends_with_that() -> None:
    upload = Upload(silence(), 0.0)
    waiting = asyncio.create_task(upload.next_frame())
    while upload._scope is None or not upload._scope.expired():  # noqa: ASYNC110 - it is a matter of turns
        await asyncio.sleep(0)
    upload.interrupt(ConflictError("a newer upload took over"))
    with pytest.raises(ConflictError, match="a newer upload"):
        await waiting


@pytest.mark.parametrize("phase", [Phase.SEALED, Phase.ABORTED])
async def test_a_stream_that_waited_through_the_end_of_its_round_is_refused(tmp_path: Path, phase: Phase) -> None:
    waiting = Waiting(tmp_path)
    later = RoundKey(JOB, RoundNumber(2), 0)
    await waiting.until_waiting()
    waiting.live.phase = phase
    waiting.rounds[later] = LiveRound(waiting.live.terms)
    waiting.let_go()
    with pytest.raises(PreconditionError, match="round 2 of job job-1 is open now"):
        await waiting.task
    assert waiting.live.seat(SeatIndex(0)).upload is None


async def test_a_stream_that_waited_is_refused_when_its_round_is_forgotten(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    await waiting.until_waiting()
    del waiting.rounds[KEY]
    waiting.let_go()
    with pytest.raises(PreconditionError, match="is not open"):
        await waiting.task
