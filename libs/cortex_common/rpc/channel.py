"""Channels to other nodes: mutual TLS, the server's role proven by the handshake."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Lock

import grpc
import grpc.aio

from cortex_common.clock import Clock, SystemClock
from cortex_common.errors import CortexError
from cortex_common.identity import Role, TlsFiles
from cortex_common.rpc.renewing import RenewingChannel
from cortex_common.rpc.server import (
    KEEPALIVE_S,
    KEEPALIVE_TIMEOUT_S,
    MAX_MESSAGE_BYTES,
    bulk_options,
    keepalive_options,
)
from cortex_common.rpc.tls import TlsMaterial, client_credentials, current_material, files_stamp

_SYSTEM_CLOCK = SystemClock()

WINDOW_BYTES = 4 * 1024 * 1024
"""Of one download: a node has one or two at a time, so it can be large enough for 100 Mbit/s at 200 ms."""


def open_channel(
    address: str, tls: TlsFiles, server_role: Role, *, bulk: bool = False, clock: Clock = _SYSTEM_CLOCK
) -> RenewingChannel:
    """A channel to the node at `address`; it connects at the first call and again whenever it must.

    When the certificate files change, calls go over a new connection from then on; see `RenewingChannel`.

    Args:
        address: host:port.
        tls: This node's certificate.
        server_role: What must answer there; any other role fails the handshake.
        bulk: True for the data plane, which must not share a connection with the control plane.
        clock: Tells whether the certificate is still good.

    Raises:
        NotFoundError, InvalidArgumentError: the TLS files are not usable.
        UnauthenticatedError: this node's certificate has expired.
    """
    options = channel_options(server_role, bulk=bulk)

    def dial(material: TlsMaterial) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, client_credentials(material), options=options)

    return RenewingChannel(dial, tls, clock)


def open_sync_channel(
    address: str, tls: TlsFiles, server_role: Role, *, bulk: bool = False, clock: Clock = _SYSTEM_CLOCK
) -> grpc.Channel:
    """`open_channel` for programs without an event loop."""
    credentials = client_credentials(current_material(tls, clock))
    return grpc.secure_channel(address, credentials, options=channel_options(server_role, bulk=bulk))


class RenewingSyncChannel:
    """`open_sync_channel`, opened anew when the certificate files have changed."""

    def __init__(
        self, address: str, tls: TlsFiles, server_role: Role, clock: Clock = _SYSTEM_CLOCK, *, bulk: bool = False
    ) -> None:
        self._open: Callable[[], grpc.Channel] = partial(
            open_sync_channel, address, tls, server_role, bulk=bulk, clock=clock
        )
        self._tls = tls
        self._stamp = files_stamp(tls)
        self._channel = self._open()
        self._before: list[grpc.Channel] = []
        self._one_at_a_time = Lock()

    def current(self) -> grpc.Channel:
        """The channel to call over now; calls on the ones before go on."""
        with self._one_at_a_time:
            stamp = files_stamp(self._tls)
            if stamp != self._stamp:
                with suppress(CortexError):  # files that do not fit together yet; the channel there is may still do
                    fresh = self._open()
                    self._before.append(self._channel)
                    self._channel, self._stamp = fresh, stamp
            return self._channel

    def close(self) -> None:
        """Close every channel."""
        for channel in (self._channel, *self._before):
            channel.close()


def channel_options(server_role: Role, *, bulk: bool = False) -> list[tuple[str, str | int]]:
    """Knobs of gRPC on the calling side."""
    options: list[tuple[str, str | int]] = [
        ("grpc.ssl_target_name_override", server_role.server_name),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Room for an answer that lists every mistake of a request.
        ("grpc.max_metadata_size", 64 * 1024),
        ("grpc.absolute_max_metadata_size", 64 * 1024),
        *keepalive_options(KEEPALIVE_S, KEEPALIVE_TIMEOUT_S),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Also the limit of one attempt to connect.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # A service that was killed is back in a second or two; callers have a backoff of their own above this.
        # Measured: 0.3 s from a server's return after 10 s to the first answer, 5 s with gRPC's own pauses.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # One connection a channel: a transfer must not hold up a heartbeat.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return options + (list[tuple[str, str | int]](bulk_options(WINDOW_BYTES)) if bulk else [])
