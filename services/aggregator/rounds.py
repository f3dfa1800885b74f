"""Rounds in memory: who has uploaded what, and waking whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cortex_common.errors import CorruptError
from cortex_common.ids import JobId, NodeName, SeatIndex
from cortex_common.logging import get_logger
from cortex_common.security.encryption import DataKey, ObjectHeader
from cortex_common.tensors import Manifest
from cortex_common.transfer import Receipt
from services.aggregator.domain import Contribution, Phase, RoundKey, RoundTerms
from services.aggregator.spool import SeatSpool, remove_seat, spooled_seats
from services.aggregator.store import RoundStore, StoredRound
from services.aggregator.uploads import Upload

log = get_logger(__name__)


class Signal:
    """Level-triggered waking: take `event` first, look at the state, then wait on it."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def fire(self) -> None:
        """Wake everybody who waits on the event handed out so far."""
        self.event.set()
        self.event = asyncio.Event()


@dataclass(slots=True)
class SeatState:
    """One seat of a live round."""

    spool: SeatSpool | None = None
    receipt: Receipt | None = None
    upload: Upload | None = None


@dataclass(frozen=True, slots=True)
class SeatProgress:
    """One seat as watchers see it."""

    seat: SeatIndex
    worker: NodeName
    chunks_received: int
    chunks_total: int
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class RoundView:
    """A round as watchers see it."""

    seats: tuple[SeatProgress, ...]
    bytes_down: int
    closed: bool


@dataclass(slots=True)
class LiveRound:
    """A round known here. `data_key` is None after a restart until it comes again."""

    terms: RoundTerms
    phase: Phase = Phase.OPEN
    reason: str = ""
    data_key: DataKey | None = None
    base: Manifest | None = None
    seats: dict[SeatIndex, SeatState] = field(default_factory=dict)
    bytes_down: int = 0
    relayed_bytes: int = 0
    """A region's: of versions fetched from above since the round forwarded before."""
    changed: Signal = field(default_factory=Signal)
    outgoing: tuple[tuple[Contribution, ...], ObjectHeader] | None = None
    """A region's: the list being forwarded, and as which object, so that its upload goes on when asked for again."""

    @classmethod
    def restored(cls, stored: StoredRound, store: RoundStore) -> LiveRound:
        """A round as an earlier process left it, without its data key."""
        live = cls(stored.terms, stored.phase, stored.reason)
        directory = store.directory(stored.terms.key)
        for index in spooled_seats(directory):
            live.seats[index] = _restored_seat(directory, live.terms.key, index)
        return live

    @property
    def spool_bytes(self) -> int:
        """Sealed bytes of its updates."""
        return sum(state.spool.size_bytes for state in self.seats.values() if state.spool is not None)

    def seat(self, index: SeatIndex) -> SeatState:
        """The seat's state, made at first use."""
        return self.seats.setdefault(index, SeatState())

    def spool(self, index: SeatIndex) -> SeatSpool:
        """An accepted update. CorruptError: it is no longer in the spool."""
        spool = self.seats[index].spool
        if spool is None:
            raise CorruptError(f"{self.terms.key}: the update of seat {index} is no longer in the spool")
        return spool

    @property
    def receipts(self) -> Mapping[SeatIndex, Receipt]:
        """Accepted updates."""
        return {index: state.receipt for index, state in self.seats.items() if state.receipt is not None}

    def stored(self) -> StoredRound:
        """What of it survives a restart."""
        return StoredRound(self.terms, self.phase, self.reason)

    def view(self) -> RoundView:
        """The round now."""
        owners = dict(self.terms.seats) | {index: receipt.worker for index, receipt in self.receipts.items()}
        seats = tuple(self._progress(index, worker) for index, worker in sorted(owners.items()))
        return RoundView(seats, self.bytes_down, self.phase is not Phase.OPEN)

    def close_files(self) -> None:
        """Give all spool files up."""
        for state in self.seats.values():
            if state.spool is not None:
                state.spool.close()

    def _progress(self, index: SeatIndex, worker: NodeName) -> SeatProgress:
        state = self.seats.get(index, SeatState())
        received = state.spool.chunks if state.spool else 0
        total = state.spool.header.chunks if state.spool else 0
        return SeatProgress(index, worker, received, total, state.receipt)


def newest_of(rounds: Mapping[RoundKey, LiveRound], job_id: JobId) -> Sequence[RoundTerms]:
    """The newest round of a job that is known here: one a tier."""
    mine = [live.terms for live in rounds.values() if live.terms.model_job_id == job_id]
    newest = max(((terms.key.round, terms.key.attempt) for terms in mine), default=None)
    return [terms for terms in mine if (terms.key.round, terms.key.attempt) == newest]


def members_of(rounds: Mapping[RoundKey, LiveRound], job_id: JobId) -> frozenset[NodeName]:
    """Who holds a seat of a job now, as its newest round here says."""
    return frozenset[NodeName]().union(*(terms.members for terms in newest_of(rounds, job_id)))


def _restored_seat(directory: Path, key: RoundKey, index: SeatIndex) -> SeatState:
    """What a seat's files hold; files that contradict themselves are removed, so that the seat can be filled anew."""
    try:
        spool, receipt = SeatSpool.load(directory, index)
        _require_of_seat(spool, receipt, key, index)
    except CorruptError as error:
        log.error("update_lost", directory=str(directory), seat=index, reason=error.message)
        remove_seat(directory, index)
        return SeatState()
    return SeatState(spool, receipt)


def _require_of_seat(spool: SeatSpool, receipt: Receipt | None, key: RoundKey, index: SeatIndex) -> None:
    """A whole update in the wrong place is as bad as a damaged one."""
    header = spool.header
    found = {(RoundKey(header.job_id, header.round, header.attempt), header.seat)}
    if receipt is not None:
        found.add((RoundKey(receipt.job_id, receipt.round, receipt.attempt), receipt.seat))
    if found != {(key, index)}:
        spool.close()
        raise CorruptError(f"the update is that of another seat or round: {header.job_id} {header.round}")
