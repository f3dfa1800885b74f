"""Channels that outlive a certificate: replaced when the files change, the old connection drained, no call dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from cortex_common.clock import Clock
from cortex_common.errors import CortexError, UnavailableError
from cortex_common.identity import TlsFiles
from cortex_common.logging import get_logger
from cortex_common.rpc.tls import current_material, files_stamp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cortex_common.rpc.tls import TlsMaterial

_log = get_logger(__name__)

CHECK_EVERY_S = 1.0
Dial = Callable[["TlsMaterial"], grpc.aio.Channel]
_Message = TypeVar("_Message")


class RenewingChannel(grpc.aio.Channel):
    """A channel that always calls with the certificate that lies in the files.

    gRPC reads a client's certificate once. So this one looks at the files every second; when they have changed, new
    calls go over a new connection, and the old one is closed once its last call has ended. Streams that last move over
    by `follow`.
    """

    def __init__(self, dial: Dial, tls: TlsFiles, clock: Clock) -> None:
        self._dial = dial
        self._tls = tls
        self._clock = clock
        self._stamp = files_stamp(tls)
        self._serial, self._current = 0, _Connection(dial(current_material(tls, clock)))
        self._draining: set[_Connection] = set()
        self._renewed: set[Callable[[], None]] = set()
        self._reason = ""
        self._refusal = ""
        self._watch = asyncio.ensure_future(self._watch_forever())

    @property
    def serial(self) -> int:
        """How often the connection has been replaced."""
        return self._serial

    @contextmanager
    def on_renewal(self, act: Callable[[], None]) -> Iterator[None]:
        """Have `act` called inside the block whenever the connection has been replaced."""
        self._renewed.add(act)
        try:
            yield
        finally:
            self._renewed.discard(act)

    def refuse(self, reason: str) -> None:
        """Let no more calls begin and cut off those that are open; with an empty reason, let them begin again."""
        self._refusal = reason
        if reason:
            for connection in (self._current, *self._draining):
                connection.cut()
            # Nor does the connection stay: the next look at the files has it replaced, and nothing calls over that.
            self._stamp = ()

    def refresh(self) -> None:
        """Replace the connection if the files have changed; files that do not fit together are looked at again."""
        stamp = files_stamp(self._tls)
        if stamp == self._stamp:
            return
        try:
            fresh = _Connection(self._dial(current_material(self._tls, self._clock)))
        except CortexError as error:
            if error.message != self._reason:
                self._reason = error.message
                _log.warning("certificate_files_not_usable", reason=error.message)
            return
        self._stamp, self._reason = stamp, ""
        self._serial, old, self._current = self._serial + 1, self._current, fresh
        self._draining.add(old)
        old.drain(self._draining.discard)
        for act in list(self._renewed):
            act()

    async def _watch_forever(self) -> None:
        while True:
            await self._clock.sleep(CHECK_EVERY_S)
            self.refresh()

    async def close(self, grace: float | None = None) -> None:
        """Close every connection."""
        self._watch.cancel()
        for connection in [self._current, *self._draining]:
            await connection.channel.close(grace)
        self._draining.clear()

    async def __aenter__(self) -> RenewingChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """State of the newest connection."""
        return self._current.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return when the newest connection's state differs."""
        await self._current.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Return when the newest connection is up."""
        await self._current.channel.channel_ready()

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        """As a channel's."""
        return _Method(self, "unary_unary", method, options)

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        """As a channel's."""
        return _Method(self, "unary_stream", method, options)

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        """As a channel's."""
        return _Method(self, "stream_unary", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        """As a channel's."""
        return _Method(self, "stream_stream", method, options)


class _Connection:
    """A channel with one certificate, and its open calls."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._open: set[Any] = set()
        self._on_drained: Callable[[_Connection], None] | None = None
        self._closing: asyncio.Future[None] | None = None

    def started(self, call: Any) -> Any:
        """Know of a call until it ends."""
        self._open.add(call)
        call.add_done_callback(self._ended)
        return call

    def cut(self) -> None:
        """Cancel every open call."""
        for call in list(self._open):
            call.cancel()

    def drain(self, on_drained: Callable[[_Connection], None]) -> None:
        """Close the channel as soon as no call is open."""
        self._on_drained = on_drained
        self._close_if_idle()

    def _ended(self, call: object) -> None:
        self._open.discard(call)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._on_drained is not None and not self._open and self._closing is None:
            self._closing = asyncio.ensure_future(self.channel.close())
            self._on_drained(self)


class _Method:
    """One RPC of a channel; bound anew to each new connection, so that stubs may be kept."""

    __slots__ = ("_bound", "_channel", "_connection", "_kind", "_method", "_options")

    def __init__(self, channel: RenewingChannel, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._channel = channel
        self._kind = kind
        self._method = method
        self._options = options
        self._connection: _Connection | None = None
        self._bound: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._channel._refusal:
            raise UnavailableError(self._channel._refusal)
        connection = self._channel._current
        if connection is not self._connection:
            self._bound = getattr(connection.channel, self._kind)(*self._method, **self._options)
            self._connection = connection
        return connection.started(self._bound(*arguments, **options))


def serial_of(channel: grpc.aio.Channel | None) -> int:
    """How often the connection of a channel has been replaced; 0 for one that does not renew."""
    return channel.serial if isinstance(channel, RenewingChannel) else 0
