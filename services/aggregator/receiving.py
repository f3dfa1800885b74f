"""Receiver: one stream per seat, from its header to its receipt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cortex_common.clock import Clock
from cortex_common.errors import (
    ConflictError,
    CorruptError,
    CortexError,
    InvalidArgumentError,
    OverloadedError,
    UnavailableError,
)
from cortex_common.identity import Identity
from cortex_common.ids import JobId, Sha256Hex
from cortex_common.logging import get_logger
from cortex_common.security.encryption import EncryptionManager, ObjectHeader
from cortex_common.storage.durable import require_room
from cortex_common.transfer import ChunkFrame, HeaderFrame, Receipt, TrailerFrame
from cortex_common.transfer.pacing import UNPACED, Pace
from cortex_common.validation import ValidationManager
from services.aggregator import metrics
from services.aggregator.domain import Phase, RoundKey, check_header, check_owner, closed_error, unknown_error
from services.aggregator.rounds import LiveRound, SeatState
from services.aggregator.settings import AggregatorSettings
from services.aggregator.spool import SeatSpool
from services.aggregator.store import RoundStore
from services.aggregator.uploads import Intake, Upload, in_thread, payload_room

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resume:
    """Where an upload goes on."""

    first_chunk: int
    already_accepted: bool = False


class Receiver:
    """Takes updates into the spool and accepts each exactly once."""

    def __init__(
        self,
        settings: AggregatorSettings,
        rounds: Mapping[RoundKey, LiveRound],
        store: RoundStore,
        encryption: EncryptionManager,
        validation: ValidationManager,
        clock: Clock,
        pace: Pace = UNPACED,
    ) -> None:
        self._pace = pace
        self._settings = settings
        self._rounds = rounds
        self._store = store
        self._encryption = encryption
        self._validation = validation
        self._clock = clock
        self._told_s = 0.0
        self._to_tell: set[RoundKey] = set()
        self.sequence = 0

    async def push(self, caller: Identity, messages: AsyncIterator[bytes]) -> AsyncIterator[Resume | Receipt]:
        """Serve one upload: first where to go on, then, once the update is durable, its receipt.

        Raises:
            PreconditionError: the round is not open; names the one that is.
            UnavailableError: the round's key is not here yet, or the stream broke off.
            InvalidArgumentError, ForbiddenError: the header does not fit, a value is not finite.
            CorruptError: a chunk or the digest is wrong.
            OverloadedError: no room in the spool.
            ConflictError: a newer upload for the seat took over.
        """
        upload = Upload(messages, self._settings.stream_idle_s)
        with _counted():
            frame = await upload.next_frame()
            if not isinstance(frame, HeaderFrame):
                raise InvalidArgumentError("an upload begins with its header")
            live, state = await self._take_over(frame.header, caller, upload)
            try:
                async for answer in self._receive(live, state, frame.header, upload):
                    yield answer
            finally:
                state.upload = None
                upload.ended.set()

    async def stop(self, live: LiveRound, error: CortexError) -> None:
        """End all uploads of a round and wait until they have let go of their files."""
        uploads = [state.upload for state in live.seats.values() if state.upload is not None]
        for upload in uploads:
            upload.interrupt(error)
        for upload in uploads:
            await upload.ended.wait()

    def _admitted(self, header: ObjectHeader, caller: Identity) -> LiveRound:
        key = RoundKey(header.job_id, header.round, header.attempt)
        live = self._rounds.get(key)
        if live is None:
            raise unknown_error(key, self._open_now(key.job_id))
        receipt = live.seat(header.seat).receipt if header.seat in live.seats else None
        if live.phase is not Phase.OPEN and (receipt is None or receipt.worker != caller.name):
            raise closed_error(key, live.phase, live.reason, self._open_now(key.job_id))
        check_owner(live.terms, header, caller)
        if receipt is None:
            if live.data_key is None:
                raise UnavailableError(f"{key} is not open yet: its coordinator has not come back; retry")
            network = self._settings.network
            check_header(live.terms, header, network, live.data_key.key_id, live.base, self._validation)
        return live

    async def _take_over(self, header: ObjectHeader, caller: Identity, upload: Upload) -> tuple[LiveRound, SeatState]:
        """The newest stream for a seat wins; the older one lets go first. Its round may be over by then."""
        while True:
            live = self._admitted(header, caller)
            state = live.seat(header.seat)
            if (older := state.upload) is None:
                state.upload = upload
                return live, state
            older.interrupt(ConflictError("a newer upload for this seat took over"))
            await older.ended.wait()

    async def _receive(
        self, live: LiveRound, state: SeatState, header: ObjectHeader, upload: Upload
    ) -> AsyncIterator[Resume | Receipt]:
        if state.receipt is not None:
            metrics.UPDATES.labels("repeated").inc()
            yield Resume(header.chunks, already_accepted=True)
            yield replace(state.receipt, newly_accepted=False)
            return
        upload.check()
        intake = _Opening(lambda: self._prepare(live, state, header))
        if state.spool is None:
            # It is begun with the first chunk, on that one's thread.
            self._require_room(live, header, 0)
            yield Resume(0)
        else:
            yield Resume((await in_thread(intake.get)).next)
        try:
            trailer = await self._chunks(live, intake, upload)
            spool, digest = intake.get().spool, intake.get().finish(trailer)
            receipt = self._receipt(header, spool, digest)
            await in_thread(lambda: spool.commit(receipt))
        except (OverloadedError, CorruptError) as error:
            # What a full disk or a wrong whole left behind helps nobody; a damaged chunk leaves good ones before it.
            if isinstance(error, OverloadedError) or intake.is_complete:
                await in_thread(lambda: self._erase(state))
            raise
        state.receipt = receipt
        live.changed.fire()
        metrics.count_accepted(header, receipt.size_bytes)
        key = live.terms.key
        log.info("update_accepted", job_id=key.job_id, round=key.round, seat=header.seat, worker=header.sender)
        yield receipt

    async def _chunks(self, live: LiveRound, intake: _Opening, upload: Upload) -> TrailerFrame:
        while not isinstance(frame := await upload.next_frame(), TrailerFrame):
            if not isinstance(frame, ChunkFrame):
                raise InvalidArgumentError(
                    "a second header in one upload; allowed after the first are chunks and a trailer"
                )
            await in_thread(lambda chunk=frame: intake.get().take(chunk))  # type: ignore[misc]
            metrics.BYTES_UP.inc(len(frame.sealed))
            metrics.SPOOL_BYTES.inc(len(frame.sealed))
            self._tell_progress(live)
            await self._pace.take(live.terms.key.job_id, len(frame.sealed))
        return frame

    def _tell_progress(self, live: LiveRound) -> None:
        """Now or a little later: the last chunk before a pause is told too."""
        now_s = self._clock.monotonic_s()
        wait_s = self._told_s + self._settings.progress_every_s - now_s
        if wait_s <= 0:
            self._told_s = now_s
            live.changed.fire()
        elif (key := live.terms.key) not in self._to_tell:
            self._to_tell.add(key)
            asyncio.get_running_loop().call_later(wait_s, self._tell_later, key, live)

    def _tell_later(self, key: RoundKey, live: LiveRound) -> None:
        self._to_tell.discard(key)
        live.changed.fire()

    def _prepare(self, live: LiveRound, state: SeatState, header: ObjectHeader) -> Intake:
        """The seat's intake to go on with: the same object is resumed, another one replaces it. Runs on a thread."""
        directory = self._store.directory(live.terms.key)
        if state.spool is not None and state.spool.header != header:
            state.spool.erase()
            state.spool = None
        self._require_room(live, header, state.spool.chunks if state.spool else 0)
        if state.spool is None:
            state.spool = SeatSpool.start(directory, header)
        intake = Intake(state.spool, self._encryption.opener(header), self._validation)
        intake.prove()
        return intake

    def _require_room(self, live: LiveRound, header: ObjectHeader, held_chunks: int) -> None:
        directory = self._store.directory(live.terms.key)
        require_room(directory, payload_room(header, held_chunks), self._settings.disk_reserve_bytes)

    def _erase(self, state: SeatState) -> None:
        if state.spool is not None:
            state.spool.erase()
            state.spool = None

    def _receipt(self, header: ObjectHeader, spool: SeatSpool, digest: bytes) -> Receipt:
        self.sequence += 1
        return Receipt(
            job_id=header.job_id,
            round=header.round,
            attempt=header.attempt,
            seat=header.seat,
            worker=header.sender,
            content_sha256=Sha256Hex(digest.hex()),
            weight=header.weight,
            size_bytes=spool.size_bytes,
            sequence=self.sequence,
        )

    def _open_now(self, job_id: JobId) -> RoundKey | None:
        open_keys = [key for key, live in self._rounds.items() if key.job_id == job_id and live.phase is Phase.OPEN]
        return max(open_keys, key=lambda key: (key.round, key.attempt), default=None)


class _Opening:
    """An upload's intake, made by whoever needs it first."""

    def __init__(self, make: Callable[[], Intake]) -> None:
        self._make = make
        self._made: Intake | None = None

    def get(self) -> Intake:
        """The intake; the first call may block."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are here."""
        return self._made is not None and self._made.complete


@contextmanager
def _counted() -> Iterator[None]:
    """Count uploads that end with an error by its class."""
    try:
        yield
    except CortexError as error:
        metrics.UPDATES.labels(type(error).__name__.removesuffix("Error").lower()).inc()
        raise
