"""Bulk channels to aggregators one tier up."""

from __future__ import annotations

from typing import Protocol

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.channel import open_channel


class Channels(Protocol):
    """Finds the channel to an address."""

    def to(self, address: str) -> grpc.aio.Channel:
        """A channel; the same one for the same address."""


class UpstreamChannels:
    """Channels by address, opened at first use."""

    def __init__(self, tls: TlsFiles, clock: Clock) -> None:
        self._tls = tls
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}

    def to(self, address: str) -> grpc.aio.Channel:
        """A channel; the same one for the same address."""
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._tls, Role.AGGREGATOR, bulk=True, clock=self._clock)
        return self._channels[address]

    async def close(self) -> None:
        """Give all up."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
