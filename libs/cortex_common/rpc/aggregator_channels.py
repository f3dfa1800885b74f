"""Channels to aggregators; none to one that is shut out."""

from __future__ import annotations

from cortex_common.clock import Clock, SystemClock
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.renewing import RenewingChannel

_SYSTEM_CLOCK = SystemClock()


class AggregatorChannels:
    """Channels by address and name, kept open.

    While an aggregator is shut out, calls to it raise UnavailableError, and those that were open are cut off. What it
    is called is what the coordinator says: the handshake proves its role only.
    """

    def __init__(self, tls: TlsFiles, denied: DenyList, *, bulk: bool = True, clock: Clock = _SYSTEM_CLOCK) -> None:
        """Prepare; nothing is dialled yet.

        Args:
            tls: This process's certificate.
            denied: Who is shut out.
            bulk: False for the control plane.
            clock: Tells whether the certificate is still good.
        """
        self._tls = tls
        self._denied = denied
        self._bulk = bulk
        self._clock = clock
        self._channels: dict[tuple[str, str], RenewingChannel] = {}
        denied.on_change(self._check)

    def to(self, address: str, aggregator: str) -> RenewingChannel:
        """A channel to the aggregator of this name, at this address; the same one each time."""
        channel = self._channels.get((address, aggregator))
        if channel is None:
            channel = open_channel(address, self._tls, Role.AGGREGATOR, bulk=self._bulk, clock=self._clock)
            channel.refuse(self._denied.refusal(Role.AGGREGATOR, aggregator))
            self._channels[address, aggregator] = channel
        return channel

    async def close(self) -> None:
        """Close them all."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def _check(self) -> None:
        for (_, aggregator), channel in self._channels.items():
            channel.refuse(self._denied.refusal(Role.AGGREGATOR, aggregator))
