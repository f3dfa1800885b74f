"""WeightAggregator: opens rounds, takes updates exactly once, folds them into versions.

Runs on one event loop; everything that blocks runs on threads, on data they own. Nothing is answered
before it is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cortex_common.clock import Clock
from cortex_common.codec import WeightCompressor
from cortex_common.errors import CortexError, NotFoundError, PreconditionError, UnavailableError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber
from cortex_common.logging import get_logger
from cortex_common.security.encryption import DataKey, EncryptionManager
from cortex_common.transfer.pacing import Paces
from cortex_common.transfer.warming import CodecWarmer
from cortex_common.validation import ValidationManager
from services.aggregator import metrics
from services.aggregator.batches import BatchProcessor
from services.aggregator.client import Channels
from services.aggregator.domain import (
    Contribution,
    Phase,
    RoundKey,
    RoundTerms,
    check_contributions,
    check_fence,
    check_job_id,
    check_order,
    check_terms,
)
from services.aggregator.folding import Folder
from services.aggregator.forwarding import Forwarded, Forwarder
from services.aggregator.holdings import Holdings
from services.aggregator.pruning import droppable, is_settled
from services.aggregator.receiving import Receiver
from services.aggregator.relaying import Relay
from services.aggregator.resealing import Resealer
from services.aggregator.rounds import LiveRound, RoundView
from services.aggregator.settings import AggregatorSettings
from services.aggregator.sharing import SharedWork
from services.aggregator.store import RoundStore
from services.aggregator.strategies import create_strategy
from services.aggregator.uploads import in_thread
from services.aggregator.versions import Version, VersionStore

log = get_logger(__name__)


class WeightAggregator:
    """Rounds and versions of all jobs at this aggregator.

    `services.aggregator.main.run` builds one (`RunningAggregator.aggregator`); the coordinator opens a round, workers
    push sealed updates, and the mean of those on the coordinator's list is the next version:

    >>> from cortex_common.transfer import push_update
    >>> from services.aggregator.domain import Contribution
    >>> await aggregator.open_round(terms, [data_key])
    >>> pushed = await push_update(channel, header, encode, encryption)  # at the worker
    >>> view = await anext(aggregator.watch(terms.key))
    >>> view.seats[0].receipt == pushed.receipt
    True
    >>> receipt = pushed.receipt
    >>> listed = Contribution(receipt.seat, receipt.worker, receipt.content_sha256, receipt.weight)
    >>> version = await aggregator.seal(terms.key, terms.fence, [listed], [data_key])
    >>> version == await aggregator.seal(terms.key, terms.fence, [listed], [data_key])  # asked again, counted once
    True
    """

    def __init__(
        self,
        settings: AggregatorSettings,
        name: NodeName,
        rounds: RoundStore,
        versions: VersionStore,
        validation: ValidationManager,
        processor: BatchProcessor,
        channels: Channels,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._store = rounds
        self.versions = versions
        self._rounds: dict[RoundKey, LiveRound] = {}
        self._encryption = EncryptionManager()
        self._folder = Folder(name, settings.network, versions, processor, self._encryption, clock)
        self.paces = Paces.of(settings.bandwidth.up, settings.bandwidth.down, clock)
        self.receiver = Receiver(settings, self._rounds, rounds, self._encryption, validation, clock, self.paces.down)
        self._forwarder = Forwarder(
            name, settings.network, self._encryption, channels, clock, settings.forward_patience_s, self.paces.up
        )
        self._warmer = CodecWarmer()
        self._relay = Relay(versions, channels, validation, clock, self._rounds, self.paces.down)
        self.holdings = Holdings(name, versions, self._relay, self._rounds)
        self._sealing: dict[RoundKey, asyncio.Task[Version]] = {}
        self._forwarding: dict[RoundKey, SharedWork[Forwarded]] = {}
        self._job_keys: dict[JobId, set[KeyId]] = {}
        self.resealer = Resealer(versions, self._raise_fence, self._is_making)
        self._stopping = False
        self._erasing: set[asyncio.Task[None]] = set()
        # One thread for all writes about rounds: they happen in the order they were decided.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rounds")

    def restore(self) -> None:
        """Take up what an earlier process left: rounds, accepted and partial updates, versions."""
        self.versions.load()
        highest = max((version.sequence for version in self.versions.all()), default=0)
        for stored in self._store.load():
            live = self._rounds[stored.terms.key] = LiveRound.restored(stored, self._store)
            if live.phase is Phase.OPEN and self._made_by(live.terms.key) is not None:
                live.phase = Phase.SEALED
            highest = max([highest, *(receipt.sequence for receipt in live.receipts.values())])
            log.info("round_restored", round=str(stored.terms.key), phase=stored.phase, accepted=len(live.receipts))
        self.receiver.sequence = highest
        self._gauge()

    async def drain(self) -> None:
        """End uploads and watches, to be resumed at the next start."""
        self._stopping = True
        for live in list(self._rounds.values()):
            live.changed.fire()
            await self.receiver.stop(live, UnavailableError("the aggregator is stopping; resume when it is back"))

    async def close(self) -> None:
        """Wait for folds under way and give files up."""
        await self.drain()
        self._relay.close()
        for forwarding in self._forwarding.values():
            forwarding.cancel(UnavailableError("the aggregator is stopping; ask again when it is back"))
        for work in (*self._sealing.values(), *self._erasing):
            await asyncio.wait((work,))
        for live in self._rounds.values():
            live.close_files()
        self._writer.shutdown()

    async def open_round(self, terms: RoundTerms, data_keys: Sequence[DataKey]) -> None:
        """Take updates for a round from now on; idempotent.

        Args:
            terms: The round's.
            data_keys: Its own, that updates are sealed under, and those that what is older is sealed under.

        Raises:
            InvalidArgumentError: impossible terms.
            ConflictError: stale fence.
            PreconditionError: a later round is open, or the same round with other terms.
            NotFoundError: the base version is not here.
        """
        self._check(terms)
        await self._raise_fence(terms.key.job_id, terms.fence)
        base = await self.holdings.layout(terms) if terms.base_sha256 else None
        self._keep_keys(terms.key.job_id, data_keys)
        live = self._rounds.get(terms.key)
        if live is None:
            live = await self._begin(terms)
        elif live.terms.substance != terms.substance:
            raise PreconditionError(f"{terms.key} has been opened with other terms: {live.terms.substance}")
        elif live.phase is not Phase.ABORTED:
            live.terms = terms if live.phase is Phase.OPEN else live.terms.refreshed(terms)
            await self._stored(lambda: self._store.save(live.stored()))
        live.data_key, live.base = data_keys[0], base
        self.holdings.follow(terms.model_job_id)
        self._warmer.want(WeightCompressor.from_wire(terms.codec, terms.codec_options))
        self._warmer.want(WeightCompressor.from_wire(terms.download_codec, terms.download_options))
        live.changed.fire()
        await self._retire(terms.key)
        if not self._is_making(terms.key.job_id):
            self._drop_keys(terms.key.job_id, but=data_keys)
        self._gauge()

    async def watch(self, key: RoundKey) -> AsyncIterator[RoundView]:
        """The round now and at each change until it is closed.

        Raises:
            NotFoundError: never opened here.
        """
        live = self._known(key)
        while True:
            event = live.changed.event
            view = live.view()
            yield view
            if view.closed:
                return
            if self._stopping:
                raise UnavailableError("the aggregator is stopping; watch again when it is back")
            await event.wait()

    async def seal(
        self, key: RoundKey, fence: int, contributions: Sequence[Contribution], data_keys: Sequence[DataKey]
    ) -> Version:
        """Freeze the list, fold it, and answer once the version is durable; idempotent.

        Raises:
            ConflictError: stale fence.
            PreconditionError: a listed update is not accepted here, the round was given up or sealed with another list.
            CorruptError: a spooled update no longer opens.
        """
        await self._raise_fence(key.job_id, fence)
        self._keep_keys(key.job_id, data_keys)
        done = self._made_by(key)
        if done is not None:
            return done.of_list(key, contributions)
        running = self._sealing.get(key)
        if running is not None:
            return (await asyncio.shield(running)).of_list(key, contributions)
        self.resealer.check_free(key.job_id)
        live, listed = self._freezable(key, contributions)
        task = self._sealing[key] = asyncio.create_task(self._seal(live, listed))
        task.add_done_callback(lambda _: self._sealing.pop(key, None))
        return await asyncio.shield(task)

    async def forward(
        self, key: RoundKey, fence: int, contributions: Sequence[Contribution], data_keys: Sequence[DataKey]
    ) -> Forwarded:
        """Freeze the list and push its mean one tier up; idempotent, and asked again it goes on.

        Raises:
            ConflictError: stale fence.
            UnavailableError: the upper aggregator is away, or has not opened the round again; says why.
            PreconditionError: a listed update is not accepted here, or there is no open round above.
            CorruptError: a spooled update no longer opens.
        """
        await self._raise_fence(key.job_id, fence)
        self._keep_keys(key.job_id, data_keys)
        running = self._forwarding.get(key)
        if running is None:
            live, listed = self._freezable(key, contributions)
            running = self._forwarding[key] = SharedWork(self._forward(live, listed))
            running.task.add_done_callback(lambda _: self._forwarding.pop(key, None))
        return await running.result()

    async def abort(self, key: RoundKey, fence: int, reason: str) -> None:
        """Give up a round: later uploads are refused with the reason; idempotent.

        Raises:
            ConflictError: stale fence.
            PreconditionError: its version exists already.
        """
        await self._raise_fence(key.job_id, fence)
        if key in self._sealing or self._made_by(key) is not None:
            raise PreconditionError(f"{key} is sealed: its version exists")
        live = self._rounds.get(key)
        if live is not None and live.phase is not Phase.ABORTED:
            await self._abort(live, reason)
        self._gauge()

    async def prune(self, job_id: JobId, fence: int, keep: Sequence[RoundNumber], *, ended: bool = False) -> int:
        """Erase versions but those of `keep` and those still needed, and the spool of rounds that are over.

        Args:
            job_id: Whose.
            fence: The coordinator's.
            keep: Rounds whose versions stay; while the job runs newer ones and bases stay too.
            ended: The job has ended: its uploads, folds and downloads end, its spool and its key go.

        Raises:
            ConflictError: stale fence.
        """
        check_job_id(job_id)
        await self._raise_fence(job_id, fence)
        if ended:
            await self._end(job_id)
        drop = droppable(self.versions, job_id, self._rounds.values(), keep, ended=ended)
        for version in drop:
            await in_thread(lambda version=version: self.versions.delete(version))  # type: ignore[misc]
        newest = self._newest(job_id)
        for key, live in list(self._rounds.items()):
            if key.job_id == job_id and newest and is_settled(live, self.versions, newest) and not self._is_busy(key):
                await self._forget(key)
        for erasing in list(self._erasing):
            await asyncio.wait((erasing,))
        if ended:
            await self._clear(job_id)
        self._gauge()
        return len(drop)

    def count_download(self, key_job: JobId, number: RoundNumber, size: int) -> None:
        """Account bytes sent for a round's base version."""
        metrics.BYTES_DOWN.inc(size)
        for key, live in self._rounds.items():
            if key.job_id == key_job and key.round == number and live.phase is Phase.OPEN:
                live.bytes_down += size

    async def _begin(self, terms: RoundTerms) -> LiveRound:
        """A round not known yet; forgotten again if it cannot be stored."""
        check_order(terms.key, self._newest(terms.key.job_id))
        live = self._rounds[terms.key] = LiveRound(terms)
        try:
            await self._stored(lambda: self._store.save(live.stored()))
        except CortexError:
            del self._rounds[terms.key]
            raise
        log.info("round_opened", job_id=terms.key.job_id, round=terms.key.round, seats=len(terms.seats))
        return live

    async def _seal(self, live: LiveRound, listed: tuple[Contribution, ...]) -> Version:
        key = live.terms.key
        await self._close(live)
        # The fold need not wait for the disk, only the answer does: a version without it closes its round, see restore.
        saving = asyncio.create_task(self._save_closed(live))
        try:
            version = await self._folder.fold(live, listed, self.receiver.sequence)
        finally:
            await asyncio.wait((saving,))
        await saving
        log.info("round_sealed", job_id=key.job_id, round=key.round, sha256=version.sha256, updates=len(listed))
        self._gauge()
        return version

    async def _forward(self, live: LiveRound, listed: tuple[Contribution, ...]) -> Forwarded:
        await self._close(live)
        await self._save_closed(live)
        live.relayed_bytes += self._relay.take_relayed(live.terms.model_job_id)
        receipt = await self._forwarder.forward(live, listed)
        key = live.terms.key
        log.info("round_forwarded", job_id=key.job_id, round=key.round, updates=len(listed), bytes=receipt.size_bytes)
        return Forwarded(receipt, live.relayed_bytes)

    async def _close(self, live: LiveRound) -> None:
        """No update comes in from now on."""
        live.phase = Phase.SEALED
        frozen = PreconditionError(f"{live.terms.key} is sealed: its list of contributions is frozen")
        await self.receiver.stop(live, frozen)

    async def _save_closed(self, live: LiveRound) -> None:
        """Nor after a restart."""
        await self._stored(lambda: self._store.save(live.stored()))
        live.changed.fire()

    def _check(self, terms: RoundTerms) -> None:
        check_terms(terms, self._settings.max_seats)
        WeightCompressor.from_wire(terms.codec, terms.codec_options)
        WeightCompressor.from_wire(terms.download_codec, terms.download_options)
        create_strategy(terms.strategy, terms.strategy_options)

    async def _raise_fence(self, job_id: JobId, fence: int) -> None:
        check_job_id(job_id)
        seen = self._store.fence(job_id)
        check_fence(job_id, seen, fence)
        if fence > seen:
            await self._stored(lambda: self._store.raise_fence(job_id, fence))

    async def _retire(self, opened: RoundKey) -> None:
        """A newer round or attempt ends the older ones of its job; their spool is no longer needed."""
        for key, live in list(self._rounds.items()):
            if key.job_id != opened.job_id or (key.round, key.attempt) >= (opened.round, opened.attempt):
                continue
            if live.phase is Phase.OPEN:
                await self._abort(live, f"superseded by {opened}")
            if key.round < opened.round and not self._is_busy(key):
                await self._forget(key)

    async def _abort(self, live: LiveRound, reason: str) -> None:
        key = live.terms.key
        live.phase, live.reason = Phase.ABORTED, reason
        await self.receiver.stop(live, PreconditionError(f"{key} was given up ({reason})"))
        live.close_files()
        live.seats.clear()
        await self._stored(lambda: self._store.erase(key))
        await self._stored(lambda: self._store.save(live.stored()))
        live.changed.fire()
        log.info("round_aborted", job_id=key.job_id, round=key.round, attempt=key.attempt, reason=reason)

    async def _end(self, job_id: JobId) -> None:
        """Nothing of an ended job goes on, and nothing of its rounds stays."""
        error = PreconditionError(f"job {job_id} is over: the job has ended")
        mine = [key for key in self._rounds if key.job_id == job_id]
        for key in mine:
            if self._rounds[key].phase is Phase.OPEN:
                self._rounds[key].phase, self._rounds[key].reason = Phase.ABORTED, "the job has ended"
        await self._relay.stop(job_id, error)
        await self.holdings.remember_members(job_id)
        for key in mine:
            if (forwarding := self._forwarding.get(key)) is not None:
                await forwarding.stop(error)
            if (sealing := self._sealing.get(key)) is not None:
                await asyncio.wait((sealing,))
            await self._forget(key, "the job has ended")
        log.info("job_ended", job_id=job_id, rounds=len(mine))

    async def _clear(self, job_id: JobId) -> None:
        """What an ended job leaves: whole versions, served sealed, and the fence as long as there are any."""
        self._drop_keys(job_id)
        await self._stored(lambda: self._store.erase_job(job_id))
        await in_thread(lambda: self.versions.sweep(job_id))
        if not self.versions.of_job(job_id):
            await self._stored(lambda: self._store.forget_fence(job_id))

    async def _forget(self, key: RoundKey, reason: str = "a later one is open") -> None:
        live = self._rounds.pop(key, None)
        if live is None:
            return
        await self.receiver.stop(live, PreconditionError(f"{key} is over: {reason}"))
        live.close_files()
        live.changed.fire()
        # Nobody waits for it: gigabytes take a while to unlink, and what a kill leaves is retired at the next opening.
        erasing = asyncio.create_task(in_thread(lambda: self._store.erase(key)))
        self._erasing.add(erasing)
        erasing.add_done_callback(self._erasing.discard)

    async def _stored(self, write: Callable[[], None]) -> None:
        await in_thread(write, self._writer)

    def _keep_keys(self, job_id: JobId, data_keys: Sequence[DataKey]) -> None:
        for data_key in data_keys:
            self._encryption.add(data_key)
            self._job_keys.setdefault(job_id, set()).add(data_key.key_id)

    def _drop_keys(self, job_id: JobId, but: Sequence[DataKey] = ()) -> None:
        """A job's keys go, but for these and those that the round above or below still needs."""
        gone = self._job_keys.pop(job_id, set())
        if but:
            self._job_keys[job_id] = {data_key.key_id for data_key in but}
        for key_id in gone.difference(*self._job_keys.values()):
            self._encryption.forget(key_id)

    def _made_by(self, key: RoundKey) -> Version | None:
        """The version that very attempt made."""
        version = self.versions.of_round(key.job_id, key.round)
        return version if version is not None and version.header.attempt == key.attempt else None

    def _freezable(
        self, key: RoundKey, contributions: Sequence[Contribution]
    ) -> tuple[LiveRound, tuple[Contribution, ...]]:
        """A round and its list, in seat order.

        Raises:
            PreconditionError: a listed update is not accepted here: the round was given up, or lost with its updates.
        """
        live = self._rounds.get(key)
        if live is not None and live.phase is Phase.ABORTED:
            raise PreconditionError(f"{key} was given up: {live.reason}")
        listed = check_contributions(key, contributions, live.receipts if live else {})
        return self._known(key), listed

    def _is_making(self, job_id: JobId) -> bool:
        return any(key.job_id == job_id for key in (*self._sealing, *self._forwarding))

    def _is_busy(self, key: RoundKey) -> bool:
        return key in self._sealing or key in self._forwarding

    def _known(self, key: RoundKey) -> LiveRound:
        live = self._rounds.get(key)
        if live is None:
            raise NotFoundError(f"{key} was never opened here")
        return live

    def _newest(self, job_id: JobId) -> RoundKey | None:
        keys = [key for key in self._rounds if key.job_id == job_id]
        return max(keys, key=lambda key: (key.round, key.attempt), default=None)

    def _gauge(self) -> None:
        metrics.OPEN_ROUNDS.set(sum(live.phase is Phase.OPEN for live in self._rounds.values()))
        metrics.VERSIONS.set(sum(1 for _ in self.versions.all()))
        metrics.SPOOL_BYTES.set(sum(live.spool_bytes for live in self._rounds.values()))
