"""Channels to aggregators one tier up, as the others see them."""

from __future__ import annotations

from typing import Protocol

import grpc.aio


class Channels(Protocol):
    """Finds the channel to an aggregator."""

    def to(self, address: str, aggregator: str) -> grpc.aio.Channel:
        """A channel; the same one for the same address and name."""
