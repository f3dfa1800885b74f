"""A WebSocket from a node to a gateway: opened, joined, kept admitted, and read by one task."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from cortex_common.errors import (
    CortexError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.logging import get_logger
from cortex_common.network import messages as m
from cortex_common.network.close_codes import error_of_close
from cortex_common.network.protocol import Envelope, TenzroProtocol, type_of
from cortex_common.rpc.errors import error_of_code
from cortex_common.rpc.server import MAX_MESSAGE_BYTES
from cortex_common.security.node_tokens import NodeToken

_log = get_logger(__name__)

_MAX_QUEUED = 2
_PING_EVERY_S = 20.0
# A slow link may have a minute of weights before it.
_PONG_S = 60.0
_CLOSE_S = 2.0
_PROXIES = "http://host:port or https://host:port, and with the package python-socks socks5h://host:port"
Received = Envelope | bytes
_M = TypeVar("_M", m.Challenge, m.Welcome)


@dataclass(frozen=True, slots=True)
class GatewayAccess:
    """How a node reaches its gateway.

    Attributes:
        url: `ws://` or `wss://` host:port.
        token: What the node proves itself with.
        hello: Who it is.
        sealing_key: Its X25519 public key, in hexadecimal: job keys come wrapped to it.
        ca: PEM file of the authorities to trust for `wss`; the system's if None.
        proxy: URL of an HTTP CONNECT proxy, or of a SOCKS one where the package python-socks is; True takes it from the
            environment (`HTTPS_PROXY` …), None goes without.
        timeout_s: For connecting and joining.
    """

    url: str
    token: NodeToken
    hello: m.Hello
    sealing_key: str
    ca: Path | None = None
    proxy: str | Literal[True] | None = True
    timeout_s: float = 30.0


class Link:
    """An open connection that has joined. Made by `open_link`."""

    def __init__(self, connection: ClientConnection, access: GatewayAccess, *, attends: bool) -> None:
        self._connection = connection
        self._access = access
        self._attends = attends
        self._ids = itertools.count(1)
        self._error: CortexError | None = None
        self._over = asyncio.Event()
        self.welcome: m.Welcome
        self.on_received: Callable[[Received], Awaitable[None]] = _ignored

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return not self._over.is_set()

    def next_id(self) -> int:
        """An id for a request."""
        return next(self._ids)

    async def send(self, message: m.FromNode, number: int | None = None, ref: int | None = None) -> None:
        """Send a message; returns when there is room for the next.

        Raises:
            CortexError: why the connection ended.
        """
        _log.debug("message_sent", type=type_of(type(message)), id=number, ref=ref)
        await self._send(TenzroProtocol.encode(Envelope(message, number, ref)))

    async def send_frame(self, frame: bytes) -> None:
        """Send a binary frame; returns when there is room for the next.

        Raises:
            CortexError: why the connection ended.
        """
        await self._send(frame)

    async def run(self) -> CortexError:
        """Read until the connection ends; why it did. Every message goes to `on_received`, one after another."""
        try:
            while True:
                received = await self._receive()
                if isinstance(received, Envelope) and isinstance(received.message, m.Challenge):
                    await self._join(received.message)
                elif isinstance(received, Envelope) and isinstance(received.message, m.Welcome):
                    self.welcome = received.message
                else:
                    await self.on_received(received)
        except CortexError as error:
            self._error = self._error or error
            return self._error
        finally:
            self._over.set()

    async def join(self) -> None:
        """Answer the gateway's first challenge.

        Raises:
            CortexError: the gateway does not let the node in; says why.
        """
        challenge = await self._expect(m.Challenge)
        await self._join(challenge)
        self.welcome = await self._expect(m.Welcome)

    async def close(self) -> None:
        """Hang up."""
        self._over.set()
        # The library stumbles over a transport that was reset in the middle of a long frame; it is closed then.
        with suppress(AttributeError):
            await self._connection.close()

    async def _join(self, challenge: m.Challenge) -> None:
        access = self._access
        version = TenzroProtocol.negotiate(challenge.versions)
        proof = access.token.prove(challenge.network, access.hello.node, access.sealing_key, challenge.challenge)
        join = m.Join(
            version,
            access.hello,
            access.token.token_id,
            access.sealing_key,
            challenge.challenge,
            proof,
            attends=self._attends,
        )
        await self.send(join, self.next_id())

    async def _expect(self, kind: type[_M]) -> _M:
        received = await self._receive()
        if isinstance(received, bytes) or not isinstance(received.message, kind):
            raise InvalidArgumentError(f"{self._access.url} does not speak the protocol of Cortex nodes")
        return received.message

    async def _receive(self) -> Received:
        """The next message that is no error of the connection itself.

        Raises:
            CortexError: why the connection ended.
        """
        while True:
            try:
                data = await self._connection.recv()
            except ConnectionClosed as closed:
                raise self._reason(closed) from None
            if isinstance(data, bytes):
                return data
            envelope = TenzroProtocol.decode(data)
            _log.debug("message_received", type=type_of(type(envelope.message)), id=envelope.id, ref=envelope.ref)
            if not isinstance(envelope.message, m.ErrorMessage) or envelope.ref is not None:
                return envelope
            self._error = error_of(envelope.message)  # the gateway closes next

    async def _send(self, data: str | bytes) -> None:
        try:
            await self._connection.send(data)
        except ConnectionClosed as closed:
            raise self._reason(closed) from None

    def _reason(self, closed: ConnectionClosed) -> CortexError:
        if self._error is None:
            received = closed.rcvd
            self._error = (
                error_of_close(received.code, received.reason)
                if received is not None
                else UnavailableError(f"the connection to {self._access.url} broke")
            )
        return self._error


async def open_link(access: GatewayAccess, *, attends: bool) -> Link:
    """Connect, and join.

    Raises:
        UnavailableError: nobody answers there, or not in time.
        UnauthenticatedError, ForbiddenError: the network does not let the node in; says why.
        InvalidArgumentError: no gateway of Cortex answers there, or the URL, or that of the proxy, is none.
        NotFoundError: the `ca` file cannot be read.
    """
    try:
        async with asyncio.timeout(access.timeout_s):
            connection = await connect(
                access.url,
                ssl=_tls(access),
                proxy=access.proxy,
                compression=None,
                user_agent_header=None,
                open_timeout=None,
                ping_interval=_PING_EVERY_S,
                ping_timeout=_PONG_S,
                close_timeout=_CLOSE_S,
                max_size=MAX_MESSAGE_BYTES,
                max_queue=_MAX_QUEUED,
            )
            link = Link(connection, access, attends=attends)
            try:
                await link.join()
            except BaseException:
                await connection.close()
                raise
            return link
    except TimeoutError:
        raise UnavailableError(f"{access.url} did not answer within {access.timeout_s:g} s") from None
    except (InvalidURI, UnicodeError) as error:
        raise InvalidArgumentError(f"{access.url}: {error}; allowed: ws://host:port or wss://host:port") from None
    except ssl.SSLCertVerificationError as error:
        raise UnauthenticatedError(f"the certificate of {access.url} is not trusted: {error.verify_message}") from None
    except (InvalidProxy, ImportError) as error:
        # Not the whole text: it may hold a password.
        reason = error.msg
        raise InvalidArgumentError(f"the proxy to {access.url}: {reason}; allowed: {_PROXIES}") from None
    except ProxyError as error:
        raise UnavailableError(f"the proxy to {access.url} refused: {error}") from None
    except InvalidStatus as error:
        code = error.response.status_code
        is_elsewhere = 400 <= code < 500 and code != HTTPStatus.TOO_MANY_REQUESTS
        hint = ": no gateway of Cortex takes nodes there; look at the port and the path" if is_elsewhere else ""
        raise UnavailableError(f"{access.url} answers HTTP {code}{hint}") from None
    except (OSError, InvalidHandshake) as error:
        reason = str(error).strip(". ") or type(error).__name__
        raise UnavailableError(f"{access.url} cannot be reached: {reason}") from None


def error_of(message: m.ErrorMessage) -> CortexError:
    """The error a gateway told of."""
    return error_of_code(message.code, message.message, [(each.path, each.message) for each in message.mistakes])


async def _ignored(_received: Received) -> None:
    """Nobody asked for it."""


def _tls(access: GatewayAccess) -> ssl.SSLContext | None:
    if not access.url.startswith("wss:"):
        return None
    try:
        return ssl.create_default_context(cafile=access.ca)
    except (OSError, ssl.SSLError) as error:
        raise NotFoundError(f"authority certificate {access.ca} cannot be read: {error}") from None
