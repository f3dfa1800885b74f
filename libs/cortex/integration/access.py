"""Getting at the network: where the node's token comes from, and whether the gateway lets the node in."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cortex.client import Client
from cortex.connection import find_connection
from cortex.integration.settings import ManagerSettings
from cortex.local.describe import websocket_url
from cortex.local.files import write_text
from cortex.local.layout import Layout
from cortex.local.network import read_network
from cortex_common.errors import (
    CortexError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from cortex_common.logging import get_logger
from cortex_common.network.messages import Hello
from cortex_common.network.websocket_link import GatewayAccess, open_link
from cortex_common.security.node_tokens import NodeToken
from cortex_common.security.sealing import SealingKey

_log = get_logger(__name__)

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 5.0
_HOW_TO_START = (
    "Start a network on this machine with `cortex up --detach` (it prints the WebSocket address), or set "
    "network.websocket_url to that of a running one"
)
_WHERE_FROM = (
    "Make one where the network was started, `cortex node token --gateway --name {node} --region {region}`, and give "
    "it as network.token_file, or in the variable CORTEX_NETWORK__TOKEN"
)


class Access:
    """What a node has to show; the operator's own connection too, where there is one on this machine."""

    def __init__(self, settings: ManagerSettings, sealing: SealingKey) -> None:
        self._settings = settings
        self._sealing = sealing
        self._kept = settings.node_dir / "node.token"
        self.client = _own_client()
        self.network = ""

    @property
    def token_file(self) -> Path:
        """Where the token in use is."""
        return self._settings.network.token_file or self._kept

    async def check(self, on_wait: Callable[[str], None] = lambda _: None) -> NodeToken:
        """Connect, as often and as long as the settings say, and let go again.

        Raises:
            UnavailableError: nobody answers; says how to start a network.
            UnauthenticatedError, ForbiddenError: the network does not let this node in; says why.
            NotFoundError: there is no token for it.
        """
        settings = self._settings.network

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            on_wait(f"attempt {state.attempt_number} of {settings.retry_attempts}: {error}")

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            stop=stop_after_attempt(settings.retry_attempts),
            wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            token: NodeToken = await retrying(self._let_in)
        except UnavailableError as error:
            count = "1 attempt" if settings.retry_attempts == 1 else f"{settings.retry_attempts} attempts"
            raise UnavailableError(
                f"no Cortex network answers at {settings.websocket_url} after {count}: {error.message}. "
                f"{self._remedy()}"
            ) from None
        _log.info("network_found", url=settings.websocket_url, network=self.network)
        return token

    def _remedy(self) -> str:
        """How to get a network that answers; where this machine's takes nodes, if that is somewhere else."""
        directory = self.client.connection.directory if self.client is not None else None
        with contextlib.suppress(CortexError):
            own = websocket_url(read_network(Layout.of(directory))) if directory is not None else ""
            if own and own != self._settings.network.websocket_url.rstrip("/").replace("localhost", "127.0.0.1"):
                return f"The network in {directory} takes nodes at {own}: set network.websocket_url to it"
        return _HOW_TO_START

    async def _let_in(self) -> NodeToken:
        token, is_kept = self._token()
        if token is None and self.client is None:
            await self._require_answer()
        if token is None:
            token, is_kept = await asyncio.to_thread(self._fresh_token), False
        try:
            await self._join(token)
        except UnauthenticatedError:
            if not is_kept or self.client is None:
                raise
            # Expired, or of a network that was wiped since.
            token = await asyncio.to_thread(self._fresh_token)
            await self._join(token)
        return token

    async def _require_answer(self) -> None:
        """Without a token: is there anybody at all? A stranger is refused by whoever answers."""
        with contextlib.suppress(UnauthenticatedError, ForbiddenError):
            await self._join(NodeToken.fresh())

    async def _join(self, token: NodeToken) -> None:
        network = self._settings.network
        hello = Hello(network.node_id, network.region, uuid.uuid4().hex, 1)
        public = self._sealing.public.hex()
        timeout_s = network.connection_timeout
        access = GatewayAccess(network.websocket_url, token, hello, public, ca=network.ca, timeout_s=timeout_s)
        link = await open_link(access, attends=False)
        self.network = link.welcome.network
        await link.close()

    def _token(self) -> tuple[NodeToken | None, bool]:
        """The token given, or the one kept; whether it is the latter."""
        network = self._settings.network
        if network.token is not None:
            return NodeToken.decode(network.token.get_secret_value()), False
        path = self.token_file
        try:
            return NodeToken.decode(path.read_text(encoding="ascii")), path == self._kept
        except FileNotFoundError:
            if path == self._kept:
                return None, True
            raise NotFoundError(f"network.token_file: {path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"node token {path} cannot be read: {error}") from None

    def _fresh_token(self) -> NodeToken:
        """One from the network of this machine, kept for the next start."""
        network = self._settings.network
        if self.client is None:
            how = _WHERE_FROM.format(node=network.node_id, region=network.region)
            raise NotFoundError(
                f"the network at {network.websocket_url} needs a node token for {network.node_id!r}, and there is none "
                f"(looked at network.token, network.token_file, {self._kept} and for a network of this machine). {how}"
            )
        text, _ = self.client.node_token(network.node_id, network.region)
        write_text(self._kept, text + "\n", mode=0o600)
        _log.info("node_token_made", path=str(self._kept), source=self.client.connection.source)
        return NodeToken.decode(text)


def _own_client() -> Client | None:
    """The operator's connection, found as the command finds it; None where there is none."""
    try:
        return Client(find_connection())
    except CortexError:
        return None
