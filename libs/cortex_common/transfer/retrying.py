"""Repeating a transfer until it is through: which failures are worth another attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CorruptError, OverloadedError, UnavailableError
from cortex_common.rpc.errors import error_from_rpc, unless_cut
from cortex_common.rpc.renewing import serial_of
from cortex_common.rpc.retry import backoff

T = TypeVar("T")

_TRANSPORT_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
MAX_FAULTS = 4
"""So often a peer may be full, or bytes damaged, before a transfer is given up."""


@contextmanager
def transferring(what: str, channel: grpc.aio.Channel | None = None) -> Iterator[None]:
    """Turn RPC errors of a stream into Cortex errors; one that may go on at the next attempt counts as unavailable.

    That is a stream that was reset or cancelled, or cut off here, and one that ended with the certificate with which it
    began, when its channel has a newer one.
    """
    serial = serial_of(channel)
    try:
        with unless_cut(what):
            yield
    except grpc.RpcError as error:
        call: Any = error
        if call.code() is grpc.StatusCode.UNAUTHENTICATED and serial_of(channel) != serial:
            raise UnavailableError(f"{what}: it lasted longer than the certificate it began with") from error
        if call.code() in _TRANSPORT_FAULTS and not call.trailing_metadata():
            raise UnavailableError(f"{what}: the stream broke ({call.details()})") from error
        raise error_from_rpc(error, what) from error


async def on_thread(work: Callable[[], T]) -> T:
    """Do it on another thread, whose end is waited for even when cancelled: what it uses may be given up next."""
    doing = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait((doing,))
        raise


class Patience:
    """How long attempts may go on failing without getting any further."""

    def __init__(self, limit_s: float, clock: Clock | None = None) -> None:
        self._limit_s = limit_s
        self._clock = clock or SystemClock()
        self.renew()

    def renew(self) -> None:
        """Something got through: the time begins anew."""
        self._end_s = self._clock.monotonic_s() + self._limit_s

    def is_over(self) -> bool:
        """Whether nothing has got through for so long."""
        return self._clock.monotonic_s() >= self._end_s


async def until_through(
    attempt: Callable[[], Awaitable[T]], clock: Clock | None = None, patience: Patience | None = None
) -> T:
    """Run a transfer until it succeeds: for ever while the peer is away, a few times when full or damaged.

    Args:
        attempt: One attempt.
        clock: For waiting between attempts.
        patience: Ends the waiting for a peer that is away.

    Raises:
        UnavailableError: why the last attempt failed, when the patience is over.
        CortexError: any other error, or the last one.
    """
    faults = 0

    async def once() -> T:
        nonlocal faults
        try:
            return await attempt()
        except (CorruptError, OverloadedError) as error:
            faults += 1
            if faults > MAX_FAULTS:
                raise
            raise UnavailableError(error.message) from error

    return await backoff(clock, enough=patience.is_over if patience else None)(once)
