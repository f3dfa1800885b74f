"""Forwarder: a region's frozen list becomes one update of the round above, made and sent chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cortex_common.clock import Clock
from cortex_common.errors import PreconditionError
from cortex_common.ids import NodeName, Sha256Hex
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.transfer import Receipt, push_update
from cortex_common.transfer.pacing import UNPACED, Pace
from services.aggregator.client import Channels
from services.aggregator.domain import Contribution, Upstream
from services.aggregator.means import MeanOfUpdates
from services.aggregator.rounds import LiveRound


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What came of it: the upper aggregator's receipt, and the bytes of versions fetched from there for the round."""

    receipt: Receipt
    relayed_bytes: int


class Forwarder:
    """To the aggregator above, this one is a worker: same protocol, same acceptance, same resume."""

    def __init__(
        self,
        name: NodeName,
        network: str,
        encryption: EncryptionManager,
        channels: Channels,
        clock: Clock,
        patience_s: float,
        pace: Pace = UNPACED,
    ) -> None:
        self._pace = pace
        self._patience_s = patience_s
        self._name = name
        self._network = network
        self._encryption = encryption
        self._channels = channels
        self._clock = clock

    async def forward(self, live: LiveRound, listed: Sequence[Contribution]) -> Receipt:
        """Push the weighted mean of the list, with the sum of its weights; what the upper aggregator answers.

        Asked again it goes on with the same upload; after a crash it folds again: what was accepted above stays so.

        Raises:
            UnavailableError: for a while nothing has got through to the upper aggregator, or it has not opened the
                round again; says why.
            PreconditionError: this round has no upper one, or that is not open.
            CorruptError: an update no longer opens.
        """
        upstream = _upstream(live)
        spools = [live.spool(each.seat) for each in listed]
        mean = MeanOfUpdates(spools, [each.weight for each in listed], self._encryption)
        first = spools[0].header
        plain = ObjectHeader(
            kind=ObjectKind.UPDATE,
            network=self._network,
            job_id=upstream.job_id,
            round=live.terms.key.round,
            attempt=live.terms.key.attempt,
            fence=live.terms.fence,
            sender=self._name,
            seat=upstream.seat,
            key_id=first.key_id,
            codec="none",
            codec_options="{}",
            chunk_elements=first.chunk_elements,
            elements=first.elements,
            counters=first.counters,
            chunks=first.chunks,
            manifest_sha256=first.manifest_sha256,
            base_sha256=Sha256Hex(live.terms.base_sha256),
            weight=mean.total_weight,
        )
        header = _resumed(live, listed, plain)
        pushed = await push_update(
            lambda: self._channels.to(_upstream(live).address, _upstream(live).aggregator),
            header,
            mean.encode,
            self._encryption,
            clock=self._clock,
            patience_s=self._patience_s,
            pace=self._pace,
        )
        return pushed.receipt


def _upstream(live: LiveRound) -> Upstream:
    """The round above, as it was last told: its aggregator may have moved."""
    if live.terms.upstream is None:
        raise PreconditionError(f"{live.terms.key} has no round above it: seal it instead")
    return live.terms.upstream


def _resumed(live: LiveRound, listed: Sequence[Contribution], plain: ObjectHeader) -> ObjectHeader:
    """The header of the upload begun for this very list, or that of a new object."""
    if live.outgoing is not None:
        begun_list, begun = live.outgoing
        if begun_list == tuple(listed) and replace(begun, object_id=b"", salt=b"", fence=plain.fence) == plain:
            return begun
    header = plain.fresh()
    live.outgoing = (tuple(listed), header)
    return header
