"""The worker's calls to others: its line to the coordinator, and channels to aggregators."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError
from cortex_common.identity import Role, TlsFiles
from cortex_common.logging import get_logger
from cortex_common.pb.v1 import coordinator_pb2, coordinator_pb2_grpc
from cortex_common.rpc.channel import open_channel
from cortex_common.rpc.errors import calling
from services.worker import metrics

_log = get_logger(__name__)

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 10.0
_URGENT_TIMEOUT_S = 30.0
_ACTIVITY_TIMEOUT_S = 5.0

OnAssignments = Callable[[Sequence[coordinator_pb2.Assignment], bool], None]
"""Told the whole list of assignments, and whether it is the first on a new line."""


class CoordinatorLine:
    """Holds the assignment stream open and takes reports."""

    def __init__(self, address: str, tls: TlsFiles, attend: coordinator_pb2.AttendRequest, clock: Clock) -> None:
        self._address = address
        self._tls = tls
        self._attend = attend
        self._clock = clock
        self._what = f"coordinator at {address}"
        self._channel = open_channel(address, tls, Role.COORDINATOR)
        self._stub: coordinator_pb2_grpc.AssignmentServiceAsyncStub = coordinator_pb2_grpc.AssignmentServiceStub(
            self._channel
        )
        self._reason = ""
        self.is_open = False

    async def attend_forever(self, on_assignments: OnAssignments) -> None:
        """Listen for assignments; when the line breaks, open it again, for ever."""
        failures = 0
        while True:
            try:
                await self._listen(on_assignments)
                reason = f"{self._what} closed the line"
                failures = 0
            except CortexError as error:
                failures = 0 if self.is_open else failures + 1
                reason = error.message
            finally:
                self.is_open = False
                metrics.ATTENDED.set(0)
            if reason != self._reason:
                self._reason = reason
                _log.warning("coordinator_away", reason=reason)
            await self._clock.sleep(_wait_s(failures))

    async def report(self, request: coordinator_pb2.ReportRequest, *, is_urgent: bool) -> bool:
        """Deliver a report; False when its assignment is no longer wanted.

        Args:
            request: Without the sender's name, which is added.
            is_urgent: Wait for the connection rather than fail while there is none.

        Raises:
            CortexError: not delivered; UnavailableError when it is worth another try.
        """
        request.worker = self._attend.worker
        request.incarnation = self._attend.incarnation
        timeout_s = _URGENT_TIMEOUT_S if is_urgent else _ACTIVITY_TIMEOUT_S
        with calling(self._what):
            answer = await self._stub.Report(request, timeout=timeout_s, wait_for_ready=is_urgent)
        return bool(answer.wanted)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def _listen(self, on_assignments: OnAssignments) -> None:
        """One line, until it breaks. On a channel of its own: its retries are ours, not gRPC's."""
        async with open_channel(self._address, self._tls, Role.COORDINATOR, clock=self._clock) as channel:
            stub: coordinator_pb2_grpc.AssignmentServiceAsyncStub = coordinator_pb2_grpc.AssignmentServiceStub(channel)
            with calling(self._what):
                async for response in stub.Attend(self._attend):
                    is_first, self.is_open = not self.is_open, True
                    if is_first:
                        self._reason = ""
                        metrics.ATTENDED.set(1)
                        _log.info("coordinator_reached", coordinator=self._address)
                    on_assignments(response.assignments, is_first)


class AggregatorChannels:
    """Data-plane channels by address, kept open."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    def to(self, address: str) -> grpc.aio.Channel:
        """A channel to an aggregator; the same one for the same address."""
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._tls, Role.AGGREGATOR, bulk=True)
        return self._channels[address]

    async def close(self) -> None:
        """Close them all."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class _NewestChannel:
    """As much of a channel as a download uses, found anew for each of its calls."""

    def __init__(self, find: Callable[[], grpc.aio.Channel]) -> None:
        self._find = find

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return lambda *call: self._find().unary_stream(*method, **options)(*call)


def newest_channel(find: Callable[[], grpc.aio.Channel]) -> grpc.aio.Channel:
    """A channel for one download, whose peer may move meanwhile: each attempt goes to where it is by then."""
    return cast("grpc.aio.Channel", _NewestChannel(find))


def _wait_s(failures: int) -> float:
    """Exponential with jitter, from 0.2 s to 10 s: workers must not come back all at once."""
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(failures, 10))
    return random.uniform(longest / 2, longest)  # noqa: S311  spreads load, guards nothing
