"""Forwarder: a region's frozen list becomes one update of the round above, made and sent chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

from cortex_common.clock import Clock
from cortex_common.errors import PreconditionError
from cortex_common.ids import NodeName, Sha256Hex
from cortex_common.security.encryption import EncryptionManager, ObjectHeader, ObjectKind
from cortex_common.transfer import Receipt, push_update
from services.aggregator.client import Channels
from services.aggregator.domain import Contribution
from services.aggregator.means import MeanOfUpdates
from services.aggregator.rounds import LiveRound


class Forwarder:
    """To the aggregator above, this one is a worker: same protocol, same acceptance, same resume."""

    def __init__(
        self, name: NodeName, network: str, encryption: EncryptionManager, channels: Channels, clock: Clock
    ) -> None:
        self._name = name
        self._network = network
        self._encryption = encryption
        self._channels = channels
        self._clock = clock

    async def forward(self, live: LiveRound, listed: Sequence[Contribution]) -> Receipt:
        """Push the weighted mean of the list, with the sum of its weights; what the upper aggregator answers.

        Asked again after a crash it folds again: what was accepted above stays accepted.

        Raises:
            PreconditionError: this round has no upper one, or that is not open.
            CorruptError: an update no longer opens.
        """
        upstream = live.terms.upstream
        if upstream is None:
            raise PreconditionError(f"{live.terms.key} has no round above it: seal it instead")
        spools = [live.spool(each.seat) for each in listed]
        mean = MeanOfUpdates(spools, [each.weight for each in listed], self._encryption)
        first = spools[0].header
        header = ObjectHeader(
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
        ).fresh()
        channel = self._channels.to(upstream.address)
        pushed = await push_update(channel, header, mean.encode, self._encryption, clock=self._clock)
        return pushed.receipt
